"""3D files over HTTP: every form that may be sent gives its voxels, and a set that is not whole is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save

from media.multiview import voxelize
from media.types import Int32Array
from service.api.models import Card
from tests.media.mesh_files import coloured_gltf
from tests.media.meshes import png, zipped
from tests.media.posed import ARMS, directions, draw, transforms
from tests.media.test_renders import DOCUMENT, VIEWS, cameras_json, edited, exr, files, npy
from tests.media.test_voxel_file import COORDS, FEATS, npz
from tests.service.api.block_worker import CONTINUOUS
from tests.service.api.conftest import array_of, problem
from tests.service.api.rig import Api

STEP = 1 / 16384
DEPTHS = list(VIEWS.depths)
STEPS = [np.where(depth > 0, np.rint(depth / STEP), 0).astype(np.uint16) for depth in DEPTHS]
PICTURES = {name: data for name, data in files().items() if name.endswith(".png")}


def parts(members: dict[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", (name, data)) for name, data in members.items()]


def forms_of(members: dict[str, bytes]) -> list[dict[str, Any]]:
    """Arguments of a post for both ways to send a set."""
    return [{"content": zipped(members)}, {"files": parts(members)}]


def coords_of(answer: httpx.Response) -> Int32Array:
    """Places of the one item's voxels, [n, 3]."""
    assert answer.status_code == 200, answer.text
    [item] = answer.json()["items"]
    assert item["kind"] == "voxels"
    found: Int32Array = array_of(item["coords"])[:, 1:]
    return found


def many(count: int) -> dict[str, bytes]:
    """Posed renders with so many views."""
    views = draw(ARMS, count, side=16)
    members = {"transforms.json": json.dumps(transforms(directions(count) * 2.0)).encode()}
    for number, (image, depth) in enumerate(zip(views.images, views.depths, strict=True)):
        members |= {f"{number:03}.png": png(image), f"{number:03}_depth.npy": npy(depth)}
    return members


# --- how many parts a form may have


@pytest.mark.parametrize("count", [32, 64])
def test_as_many_views_as_parts_as_in_a_zip(client: httpx.Client, count: int) -> None:
    members = many(count)
    as_zip = coords_of(client.post("/encode", content=zipped(members)))
    last = parts(members)[1:] + parts(members)[:1]  # the file of cameras comes when all others are there
    options = {"outputs": ["latents", "embedding"], "fit": "pad", "on_error": "fail"}
    assert np.array_equal(coords_of(client.post("/encode", files=last, data=options)), as_zip)


def test_more_views_than_allowed(api: Api, client: httpx.Client) -> None:
    members = many(65)
    found = problem(client.post("/encode", content=zipped(members)), 413, "too_many_items")
    assert "65 views" in found["detail"]
    found = problem(client.post("/encode", files=parts(members)), 413, "too_many_items")
    assert found["limit"] == 2 * api.settings.media.views + 1


def test_a_form_without_cameras_has_no_more_room_for_it(api: Api, client: httpx.Client) -> None:
    most = api.settings.request_items
    picture = next(iter(PICTURES.values()))
    pictures = [("file", (f"{number}.png", picture)) for number in range(most + 1)]
    found = problem(client.post("/encode", files=pictures), 413, "too_many_items")
    assert (found["limit"], found["actual"]) == (most, most + 1)
    fields = {"outputs": ["latents"] * api.settings.request_parts}
    found = problem(client.post("/encode", files=pictures[:1], data=fields), 413, "too_many_items")
    assert found["limit"] == api.settings.request_parts
    fields["outputs"].pop()
    assert client.post("/encode", files=pictures[:1], data=fields).status_code == 200


# --- posed renders, meshes and voxels that are whole


def as_depth(suffix: str, write: Callable[[Any], bytes], depths: list[npt.NDArray[Any]]) -> dict[str, bytes]:
    return PICTURES | {f"{number:03}_depth.{suffix}": write(depth) for number, depth in enumerate(depths)}


@pytest.mark.parametrize(
    ("members", "most"),
    [
        # EXR is rounded to half precision, 16-bit PNG to a hundredth of a cell: a voxel at a border may move.
        (as_depth("exr", exr, DEPTHS) | {"transforms.json": json.dumps(DOCUMENT).encode()}, 0.15),
        (
            as_depth("png", png, STEPS) | {"transforms.json": json.dumps({**DOCUMENT, "depth_scale": STEP}).encode()},
            0.03,
        ),
        (files(ftransforms_json=None) | {"cameras.json": cameras_json("pixels", "camera_to_world")}, 0.0),
    ],
    ids=["exr", "png", "cameras.json"],
)
@pytest.mark.parametrize("path", ["/encode", "/embed"])
def test_renders_in_every_form(client: httpx.Client, members: dict[str, bytes], most: float, path: str) -> None:
    wanted = {tuple(place) for place in voxelize(VIEWS).coords.tolist()}
    for request in forms_of(members):
        if path == "/embed":
            [item] = client.post(path, **request).json()["items"]
            assert (item["status"], item["kind"], item["embedding"]["shape"]) == ("ok", "voxels", [48])
            continue
        found = {tuple(place) for place in coords_of(client.post(path, **request)).tolist()}
        assert len(found ^ wanted) <= most * len(wanted)


@pytest.mark.parametrize("declared", [None, "model/gltf+json"])
def test_a_gltf_that_holds_its_own_buffer(client: httpx.Client, declared: str | None) -> None:
    headers = {"Content-Type": declared} if declared else {}
    as_text = coords_of(client.post("/encode", content=coloured_gltf().gltf(), headers=headers))
    assert np.array_equal(as_text, coords_of(client.post("/encode", content=coloured_gltf().glb())))
    assert len(as_text) > 500


@pytest.mark.parametrize(
    ("data", "declared"),
    [
        (npz(coords=COORDS, feats=FEATS), "application/x-npz"),
        (save({"coords": np.asarray(COORDS), "feats": FEATS}), "application/vnd.safetensors"),
    ],
    ids=["npz", "safetensors"],
)
@pytest.mark.parametrize("says_so", [True, False])
def test_ready_made_voxels(client: httpx.Client, data: bytes, declared: str, says_so: bool) -> None:
    request: dict[str, Any] = {"content": data, "headers": {"Content-Type": declared} if says_so else {}}
    [item] = client.post("/encode", **request).json()["items"]
    assert (item["kind"], item["tokens"], item["notes"]) == ("voxels", 3, [])
    assert np.array_equal(array_of(item["coords"])[:, 1:], COORDS)
    np.testing.assert_allclose(array_of(item["latents"]), FEATS[:, :48], rtol=1e-6)
    [item] = client.post("/embed", **request).json()["items"]
    assert item["embedding"]["shape"] == [48]


def test_voxels_that_are_none(client: httpx.Client) -> None:
    found = problem(client.post("/encode", content=npz(coords=COORDS + 60, feats=FEATS)), 422, "corrupt_media")
    assert "wanted 0 to 63" in found["detail"]
    broken = save({"coords": np.asarray(COORDS), "feats": FEATS * np.float32(np.nan)})
    problem(client.post("/embed", content=broken), 422, "non_finite_input")


# --- posed renders that are not whole

AWAY = edited(lambda d: [frame["transform_matrix"][0].__setitem__(3, 50.0) for frame in d["frames"]])
FLAT = edited(
    lambda d: d["frames"][2].update(transform_matrix=[[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 2], [0, 0, 0, 1]])
)
NONE = np.full((64, 64), np.nan, np.float32)


@pytest.mark.parametrize(
    ("members", "code", "words"),
    [
        (files(f003_depth_npy=None), "view_mismatch", "view 3: its depth map is missing"),
        (files(f003_png=None), "view_mismatch", "view 3: its picture is missing"),
        (
            files(ftransforms_json=edited(lambda d: d["frames"][1].pop("transform_matrix"))),
            "invalid_camera",
            "frame 1",
        ),
        (files(ftransforms_json=FLAT), "invalid_camera", "frame 2: transform_matrix is singular"),
        (files(f002_depth_npy=npy(NONE)), "non_finite_input", "view 2: depth row 0, column 0 is NaN"),
        (files(ftransforms_json=AWAY), "empty_object", "fills no voxel"),
        (
            as_depth("png", png, STEPS) | {"transforms.json": json.dumps(DOCUMENT).encode()},
            "view_mismatch",
            "depth_scale",
        ),
    ],
    ids=["no depth", "no picture", "no camera", "singular", "NaN", "outside", "no scale"],
)
def test_renders_that_are_not_whole(client: httpx.Client, members: dict[str, bytes], code: str, words: str) -> None:
    for request in forms_of(members):
        for path in ("/encode", "/embed"):
            assert words in problem(client.post(path, **request), 422, code)["detail"]


@pytest.mark.parametrize(
    "members",
    [
        files(ftransforms_json=None),
        as_depth("exr", exr, DEPTHS),
        as_depth("png", png, STEPS),
        {"set/.": b"1", "set/a_depth.jpg": b"2", "set/a.jpg": b"3"},
        {"only.npy": npy(VIEWS.depths[0])},
    ],
    ids=["npy", "exr", "png", "jpg", "alone"],
)
@pytest.mark.parametrize("path", ["/encode", "/embed"])
def test_depth_maps_without_cameras(client: httpx.Client, members: dict[str, bytes], path: str) -> None:
    detail = problem(client.post(path, files=parts(members)), 422, "view_mismatch")["detail"]
    assert "camera file is missing" in detail
    assert "`transforms.json` or `cameras.json`" in detail


def test_an_array_among_pictures_that_it_does_not_belong_to_fails_alone(client: httpx.Client) -> None:
    answer = client.post("/encode", files=parts({"a.png": PICTURES["000.png"], "stats.npy": npy(DEPTHS[0])})).json()
    assert [item["status"] for item in answer["items"]] == ["ok", "error"]


@pytest.mark.parametrize("names", [("a.png", "b_depth.png"), ("_depth.png", "a.png"), (".", "/", "..", "a.npy.png")])
def test_names_that_pair_nothing_are_pictures(client: httpx.Client, names: tuple[str, ...]) -> None:
    picture = next(iter(PICTURES.values()))
    items = client.post("/encode", files=[("file", (name, picture)) for name in names]).json()["items"]
    assert [(item["kind"], item["status"]) for item in items] == [("image", "ok")] * len(names)


def test_what_a_card_says_of_3d_fits_into_a_header() -> None:
    card = Card.model_validate(CONTINUOUS | {"gaussian_decoder": {"name": "mine", "note": "good\r\nSet-Cookie: a=b "}})
    assert card.splats_note == "3D comes back through mine: good Set-Cookie: a=b"
    for other in (None, {"name": "mine", "note": ""}):
        assert Card.model_validate(CONTINUOUS | {"gaussian_decoder": other}).splats_note == ""
