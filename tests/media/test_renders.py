"""Posed renders as files: every form gives the same voxels, and what does not fit together is refused by name."""

from __future__ import annotations

import io
import json
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from media.archive import open_archive
from media.asset import decode_asset
from media.errors import MediaError
from media.limits import Limits
from media.mesh_views import on_black
from media.multiview import voxelize
from media.renders import is_renders, load_renders
from media.types import Voxels
from tests.media.meshes import png, zipped
from tests.media.posed import ARMS, directions, draw, transforms
from tests.paths import CONFORMANCE, needs_conformance

LIMITS = Limits()
VIEWS = draw(ARMS, count=6, side=64)
DOCUMENT = transforms(directions(6) * 2.0)


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def exr(depth: Any, channels: str = "RGB") -> bytes:
    import OpenEXR

    far = np.where(depth < 0, 1e10, depth).astype(np.float32)
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    buffer = io.BytesIO()
    OpenEXR.File(header, dict.fromkeys(channels, far)).write(buffer)
    return buffer.getvalue()


def with_depths(suffix: str, depths: Sequence[bytes]) -> dict[str, bytes]:
    """The set with depth maps of another format."""
    members = {name: data for name, data in files().items() if not name.endswith(".npy")}
    return members | {f"{n:03}_depth.{suffix}": depth for n, depth in enumerate(depths)}


def files(**changed: bytes | None) -> dict[str, bytes]:
    """A whole set; changed: a member's other content by its name with _ for ., None: left out."""
    members = {"transforms.json": json.dumps(DOCUMENT).encode()}
    for number, (image, depth) in enumerate(zip(VIEWS.images, VIEWS.depths, strict=True)):
        members[f"{number:03}.png"] = png(image)
        members[f"{number:03}_depth.npy"] = npy(depth)
    for name in list(members):
        key = "f" + name.replace(".", "_")
        if key in changed:
            data = changed[key]
            if data is None:
                del members[name]
            else:
                members[name] = data
    return members


def load(members: dict[str, bytes], limits: Limits = LIMITS) -> Voxels:
    views, _ = load_renders(open_archive(zipped(members), limits), limits)
    return voxelize(views)


def same(a: Voxels, b: Voxels) -> bool:
    return np.array_equal(a.coords, b.coords) and np.array_equal(a.feats, b.feats)


@pytest.fixture(scope="module")
def expected() -> Voxels:
    return voxelize(VIEWS)


def test_transforms_json_in_a_folder_and_with_notes(expected: Voxels) -> None:
    assert same(load(files()), expected)
    inside = {f"set/{name}": data for name, data in files().items()} | {"read me.txt": b"hello"}
    assert is_renders(tuple(inside))
    views, notes = load_renders(open_archive(zipped(inside), LIMITS), LIMITS)
    assert same(voxelize(views), expected)
    assert notes == ("1 files belong to no view and were not read ('read me.txt')",)


def test_other_files_of_a_view_and_other_folders_are_no_views_too_many(expected: Voxels) -> None:
    more = {
        **{"000_depth.exr": b"", "001_normal.png": b"", "002.jpg": b"", "half/000.png": b"", "masks/006.png": b""},
        **{"preview.gif": b"", "scene.blend": b""},
    }
    views, notes = load_renders(open_archive(zipped(files() | more), LIMITS), LIMITS)
    assert same(voxelize(views), expected)
    assert notes == ("7 files belong to no view and were not read ('000_depth.exr')",)


def test_renders_without_their_cameras_are_told_what_is_missing() -> None:
    with pytest.raises(MediaError, match=r"transforms\.json or cameras\.json"):
        decode_asset(zipped(files(ftransforms_json=None)), "zip", LIMITS)


def cameras_json(unit: str, direction: str) -> bytes:
    views = []
    for number, frame in enumerate(DOCUMENT["frames"]):
        pose = np.array(frame["transform_matrix"]) * [1, -1, -1, 1]
        k = np.array(VIEWS.cameras.intrinsics[number], np.float64)
        if unit == "pixels":
            k[:2] *= 64
        matrix = pose if direction == "camera_to_world" else np.linalg.inv(pose)
        views.append(
            {
                "image": f"{number:03}.png",
                "depth": f"{number:03}_depth.npy",
                direction: matrix.tolist(),
                "intrinsics": k.tolist(),
            }
        )
    return json.dumps({"views": views, "intrinsics_unit": unit}).encode()


@pytest.mark.parametrize("unit", ["normalized", "pixels"])
@pytest.mark.parametrize("direction", ["camera_to_world", "world_to_camera"])
def test_cameras_json(expected: Voxels, unit: str, direction: str) -> None:
    members = files(ftransforms_json=None) | {"cameras.json": cameras_json(unit, direction)}
    assert same(load(members), expected)


def test_intrinsics_in_pixels_as_nerf_tools_write_them(expected: Voxels) -> None:
    focal = 32 / np.tan(DOCUMENT["frames"][0]["camera_angle_x"] / 2)
    frames = [{name: frame[name] for name in ("file_path", "transform_matrix")} for frame in DOCUMENT["frames"]]
    document = {"fl_x": focal, "fl_y": focal, "cx": 32, "cy": 32, "w": 64, "h": 64, "frames": frames}
    assert same(load(files(ftransforms_json=json.dumps(document).encode())), expected)
    document["h"] = 48
    with pytest.raises(MediaError, match="must be square"):
        load(files(ftransforms_json=json.dumps(document).encode()))


def test_depth_as_exr_is_rounded_as_published_and_as_png_needs_its_scale(expected: Voxels) -> None:
    half = voxelize(
        type(VIEWS)(images=VIEWS.images, depths=[d.astype(np.float16) for d in VIEWS.depths], cameras=VIEWS.cameras)
    )
    members = {name: data for name, data in files().items() if not name.endswith(".npy")}
    as_exr = members | {f"{n:03}_depth.exr": exr(depth) for n, depth in enumerate(VIEWS.depths)}
    assert same(load(as_exr), half)
    scale = 1 / 16384
    steps = [np.where(depth > 0, np.rint(depth / scale), 0).astype(np.uint16) for depth in VIEWS.depths]
    as_png = members | {f"{n:03}_depth.png": png(depth) for n, depth in enumerate(steps)}
    with pytest.raises(MediaError, match="depth_scale"):
        load(as_png)
    as_png["transforms.json"] = json.dumps({**DOCUMENT, "depth_scale": scale}).encode()
    found = load(as_png)
    cells, wanted = ({tuple(c) for c in v.coords.tolist()} for v in (found, expected))
    # A step is a hundredth of a cell: only points within it of a border may move to the next.
    assert len(cells ^ wanted) < 0.03 * len(wanted)


def test_depth_as_exr_may_be_in_a_channel_of_its_own() -> None:
    three, alone = (load(with_depths("exr", [exr(depth, names) for depth in VIEWS.depths])) for names in ("RGB", "Z"))
    assert same(alone, three)


def exr_of_sides(width: int, height: int) -> bytes:
    """A small EXR whose header says that it is so large."""
    data = exr(VIEWS.depths[1])
    window = struct.pack("<4i", 0, 0, 63, 63)
    assert data.count(window) == 2
    return data.replace(window, struct.pack("<4i", 0, 0, width - 1, height - 1))


def with_nan(depth: Any) -> Any:
    depth = depth.copy()
    depth[5, 7] = np.nan
    return depth


@pytest.mark.parametrize(
    ("depth", "code", "words"),
    [
        (exr(with_nan(VIEWS.depths[1])), "non_finite_input", "view 1: depth row 5, column 7 is NaN"),
        (exr_of_sides(5000, 5000), "image_too_large", "view 1: the depth map says that it is 5000x5000 pixels"),
        (exr_of_sides(2**30, 2**30), "corrupt_media", "view 1: the depth map is a damaged EXR"),
        (exr_of_sides(-5, 64), "corrupt_media", "view 1: the depth map is a damaged EXR"),
        (exr(VIEWS.depths[1])[:-200], "corrupt_media", "view 1: the depth map is a damaged EXR"),
        (exr(VIEWS.depths[1])[:60], "corrupt_media", "view 1: the depth map is a damaged EXR"),
        (exr(VIEWS.depths[1][:, :32]), "view_mismatch", "view 1: the depth map is 32x64; only squares fit"),
    ],
)
def test_bad_depth_as_exr_is_named(depth: bytes, code: str, words: str) -> None:
    depths = [exr(good) for good in VIEWS.depths]
    with pytest.raises(MediaError) as caught:
        load(with_depths("exr", [depths[0], depth, *depths[2:]]))
    assert (caught.value.code, words in caught.value.detail) == (code, True), caught.value


def test_without_the_package_an_exr_is_refused_and_other_forms_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    members = with_depths("exr", [exr(depth) for depth in VIEWS.depths])
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    with pytest.raises(MediaError, match=r"send \.npy") as caught:
        load(members)
    assert caught.value.code == "unsupported_codec"


def test_the_scale_of_a_depth_map_may_differ_by_view(expected: Voxels) -> None:
    scales = [(8 + number) / 131072 for number in range(6)]
    steps = [np.where(d > 0, np.rint(d / s), 0).astype(np.uint16) for d, s in zip(VIEWS.depths, scales, strict=True)]
    members = with_depths("png", [png(depth) for depth in steps])

    def scaled(document: dict[str, Any]) -> None:
        document["depth_scale"] = 99.0  # a view's own counts
        for frame, scale in zip(document["frames"], scales, strict=True):
            frame["depth_scale"] = scale

    found = load(members | {"transforms.json": edited(scaled)})
    cells, wanted = ({tuple(c) for c in v.coords.tolist()} for v in (found, expected))
    assert len(cells ^ wanted) < 0.03 * len(wanted)


def test_depth_of_eight_bits_is_too_coarse() -> None:
    flat = [np.clip(depth * 50, 0, 255).astype(np.uint8) for depth in VIEWS.depths]
    document = edited(lambda d: d.update(depth_scale=1 / 50))
    with pytest.raises(MediaError, match="view 0: the depth map must be a 16-bit PNG") as caught:
        load(with_depths("png", [png(depth) for depth in flat]) | {"transforms.json": document})
    assert caught.value.code == "view_mismatch"


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_pictures_without_alpha(expected: Voxels, suffix: str) -> None:
    def write(pixels: Any) -> bytes:
        if suffix == "png":
            return png(pixels)
        buffer = io.BytesIO()
        PILImage.fromarray(pixels).save(buffer, "JPEG", quality=100, subsampling=0)
        return buffer.getvalue()

    members = {name: data for name, data in files().items() if not name.endswith(".png")}
    members |= {f"{n:03}.{suffix}": write(on_black(image)) for n, image in enumerate(VIEWS.images)}
    if suffix == "jpg":
        names = edited(lambda d: [frame.update(file_path=frame["file_path"][:-4]) for frame in d["frames"]])
        members["transforms.json"] = names
    found = load(members)
    assert np.array_equal(found.coords, expected.coords)
    # Against RGBA they differ at the object's edges, where resizing mixes colours with the black behind it.
    colours = [v.feats.reshape(len(v.feats), -1, 3).mean(axis=1) for v in (found, expected)]
    assert np.abs(colours[0] - colours[1]).mean() < 0.1
    assert (colours[0].argmax(axis=1) == colours[1].argmax(axis=1)).mean() > 0.97


@needs_conformance
def test_the_published_case_as_a_zip() -> None:
    from safetensors.numpy import load_file

    folder = CONFORMANCE / "multiview_sphere"
    members = {
        p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".png", ".npy") or p.stem == "transforms"
    }
    asset = decode_asset(zipped(members), "zip", LIMITS, with_pictures=True)
    wanted = load_file(folder / "expected.safetensors")
    unsure = {tuple(c) for c in load_file(folder / "ambiguity.safetensors")["ambiguous_coords"].tolist()}
    keep = [tuple(c) not in unsure for c in asset.voxels.coords.tolist()]
    assert np.array_equal(asset.voxels.coords[keep], wanted["coords"])
    assert asset.pictures is not None
    assert not asset.pictures.held_out


@pytest.mark.parametrize("with_pictures", [False, True])
def test_a_reconstruction_is_scored_on_all_renders_and_says_that_none_was_held_out(
    expected: Voxels, with_pictures: bool
) -> None:
    asset = decode_asset(zipped(files()), "zip", LIMITS, with_pictures=with_pictures)
    assert same(asset.voxels, expected), "what else is asked for changes no token"
    assert (asset.pictures is not None) == with_pictures
    assert asset.voxels.notes == (
        ("the reconstruction is scored on the 6 renders that made the voxels: none was held out",)
        if with_pictures
        else ()
    )
    if asset.pictures is not None:
        assert asset.pictures.held_out is False
        assert np.array_equal(asset.pictures.world_to_camera, VIEWS.cameras.world_to_camera)
        assert np.array_equal(asset.pictures.pictures, [on_black(image) for image in VIEWS.images])


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (files(f001_png=png(VIEWS.images[1][:48, :48])), "they are 48 to 64 pixels wide"),
        (files(**{f"f{n:03}_png": png(image[::8, ::8]) for n, image in enumerate(VIEWS.images)}), "8 to 8 pixels"),
    ],
)
def test_renders_that_cannot_be_compared_are_told_so(members: dict[str, bytes], words: str) -> None:
    asked = decode_asset(zipped(members), "zip", LIMITS, with_pictures=True)
    assert asked.pictures is None
    assert "not scored on the renders" in asked.voxels.notes[0]
    assert words in asked.voxels.notes[0]
    assert decode_asset(zipped(members), "zip", LIMITS).voxels.notes == ()


def edited(change: Callable[[dict[str, Any]], object]) -> bytes:
    document = json.loads(json.dumps(DOCUMENT))
    change(document)
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("members", "code", "words"),
    [
        (files(f003_png=None), "view_mismatch", "view 3: its picture is missing"),
        (files(f003_depth_npy=None), "view_mismatch", "view 3: its depth map is missing"),
        (files(ftransforms_json=b"{"), "invalid_camera", "not valid JSON"),
        (files(ftransforms_json=b"[" * 9000), "invalid_camera", "not valid JSON"),
        (files(ftransforms_json=b"[]"), "invalid_camera", "JSON object"),
        (
            files(ftransforms_json=edited(lambda d: d["frames"][2].update(transform_matrix=[[0] * 4] * 4))),
            "invalid_camera",
            "frame 2",
        ),
        (files(ftransforms_json=edited(lambda d: d["frames"][1].pop("transform_matrix"))), "invalid_camera", "frame 1"),
        (
            files(ftransforms_json=edited(lambda d: d["frames"][1].update(file_path="../../etc/passwd"))),
            "view_mismatch",
            "beside the file of cameras",
        ),
        (
            files(ftransforms_json=edited(lambda d: d["frames"][1].update(file_path="000.png"))),
            "view_mismatch",
            "twice",
        ),
        (files(f001_depth_npy=npy(np.full((64, 64), np.nan, np.float32))), "non_finite_input", "view 1"),
        (files(f001_depth_npy=npy(np.ones((64, 32), np.float32))), "view_mismatch", "only squares"),
        (files(f001_depth_npy=npy(np.ones((64, 64), np.int16))), "view_mismatch", "wanted floats"),
        (files(f001_depth_npy=npy(np.ones((32, 32), np.float32))), "view_mismatch", "side is 32"),
        (files(f001_depth_npy=npy(VIEWS.depths[1])[:-4]), "corrupt_media", "bytes"),
        (files(f001_depth_npy=b"\x80\x04\x95pickle"), "corrupt_media", "not a .npy file"),
        (files(f001_png=png(VIEWS.images[1])[:200]), "corrupt_media", "view 1"),
        (files(f001_png=png(np.zeros((64, 32, 3), np.uint8))), "view_mismatch", "only squares"),
        (files() | {"cameras.json": b"{}"}, "view_mismatch", "2 files of cameras"),
        (
            files(ftransforms_json=edited(lambda d: d["frames"].__delitem__(slice(4, 6)))),
            "view_mismatch",
            "there are 6 pictures, 6 depth maps and 4 views in transforms.json; no view names "
            "'004.png', '004_depth.npy', '005.png', '005_depth.npy'",
        ),
        (
            files(f004_depth_npy=None, ftransforms_json=edited(lambda d: d["frames"].pop(4))),
            "view_mismatch",
            "6 pictures, 5 depth maps and 5 views in transforms.json; no view names '004.png'",
        ),
        (
            files() | {"front_depth.npy": b""},
            "view_mismatch",
            "6 pictures, 7 depth maps and 6 views in transforms.json; no view names 'front_depth.npy'",
        ),
        (
            {f"{n}": b"" for n in range(3)} | {"transforms.json": json.dumps({"frames": [{}] * 99}).encode()},
            "too_many_items",
            "99 views",
        ),
    ],
)
def test_sets_that_do_not_fit_together(members: dict[str, bytes], code: str, words: str) -> None:
    with pytest.raises(MediaError) as caught:
        load(members)
    assert (caught.value.code, words in caught.value.detail) == (code, True), caught.value


def test_a_depth_map_that_is_larger_than_allowed_is_not_read() -> None:
    with pytest.raises(MediaError, match="at most 32"):
        load(files(), Limits(view_side=32))
    members = {name: data for name, data in files().items() if name != "001_depth.npy"} | {"001_depth.exr": b"none"}
    with pytest.raises(MediaError, match="but is none"):
        load(members)
