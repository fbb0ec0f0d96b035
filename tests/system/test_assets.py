"""3D through the whole service: meshes, renders and voxels in; Gaussian files, pictures and turntables out."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import pytest

from media.archive import open_archive
from media.asset import decode_asset
from media.asset_sniff import asset_format
from media.cameras import Cameras
from media.image import decode_image
from media.limits import Limits
from media.mesh import load_mesh, load_mesh_archive
from media.mesh_views import VIEWS, normalize, render_views, sphere_cameras
from media.ply import decode_ply
from media.splat32 import decode_splat
from media.spz import decode_spz
from media.tokens import load_tokens
from media.types import Gaussians, UInt8Array
from media.video import decode_video
from model.orbit import look_at
from tests.media import meshes
from tests.media.posed import ARMS
from tests.media.test_renders import files
from tests.media.test_voxel_file import npz
from tests.paths import DATA, needs_data

TOKEN_FILE = "application/vnd.safetensors"
SH_DEGREE_0 = 0.28209479177387814


def tokens_of(client: httpx.Client, data: bytes, **options: Any) -> bytes:
    answer = client.post("/encode", content=data, params=options, headers={"Accept": TOKEN_FILE})
    assert answer.status_code == 200, answer.text
    return answer.content


def decoded(client: httpx.Client, tokens: bytes, accept: str, **options: Any) -> httpx.Response:
    headers = {"Content-Type": TOKEN_FILE, "Accept": accept}
    answer = client.post("/decode", content=tokens, params=options, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def arms_in_place(gaussians: Gaussians) -> bool:
    """Whether the tip of each arm has its colour, as a mean weighted by opacity, where normalising put it."""
    low, high = (np.array(ends) for ends in ((-0.35, -0.35, -0.35), (0.45, 0.35, 0.2)))
    middle, scale = (low + high) / 2, 1 / 0.8
    rgb = 0.5 + SH_DEGREE_0 * gaussians.colours
    weight = 1 / (1 + np.exp(-gaussians.opacities.astype(np.float64)))
    for axis, arm in enumerate(ARMS):
        box_low, box_high = (np.array(arm.low) - middle) * scale, (np.array(arm.high) - middle) * scale
        inside = ((gaussians.positions > box_low - 0.03) & (gaussians.positions < box_high + 0.03)).all(axis=1)
        tip = inside & (gaussians.positions[:, axis] > box_high[axis] - 0.12)
        if tip.sum() < 300:
            return False
        mean = (rgb[tip] * weight[tip, None]).sum(axis=0) / weight[tip].sum()
        if mean.argmax() != axis or mean[axis] < 1.5 * np.delete(mean, axis).max():
            return False
    return True


@pytest.fixture(scope="module")
def arms(client: httpx.Client) -> bytes:
    return tokens_of(client, meshes.arms_glb())


@pytest.fixture(scope="module")
def block(client: httpx.Client) -> bytes:
    """Tokens of a red cube, a quarter of the grid wide, out of voxels: a third of the arms, a tenth of their time."""
    cells = np.argwhere(np.pad(np.zeros((14, 14, 14), bool), 1, constant_values=True)) + 24
    red = np.tile(np.array([200, 30, 30], np.uint8), (len(cells), 256))
    return tokens_of(client, npz(coords=cells.astype(np.int32), feats=red))


def test_a_glb_becomes_tokens_and_gaussians_with_every_arm_in_place(client: httpx.Client, arms: bytes) -> None:
    [item] = load_tokens(arms)
    assert item.layout.kind == "voxels"
    assert set(item.coords[:, 0].tolist()) == {1}, "t is 1, as published"
    answer = decoded(client, arms, "*/*")
    assert answer.headers["Content-Type"] == "model/ply"
    gaussians = decode_ply(answer.content)
    assert len(gaussians) == 32 * len(item)
    assert arms_in_place(gaussians)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_check_above_sees_a_flipped_axis(client: httpx.Client, arms: bytes, axis: int) -> None:
    gaussians = decode_ply(decoded(client, arms, "model/ply").content)
    gaussians.positions[:, axis] *= -1
    assert not arms_in_place(gaussians)


def test_compact_files_hold_the_same(client: httpx.Client, arms: bytes) -> None:
    ply = decode_ply(decoded(client, arms, "model/ply").content)
    splat = decoded(client, arms, "application/octet-stream").content
    spz = decoded(client, arms, "application/octet-stream", format="spz").content
    assert arms_in_place(decode_splat(splat))
    assert arms_in_place(decode_spz(spz))
    assert decoded(client, arms, "*/*", format="spz").content == spz
    assert decoded(client, arms, "*/*", format="ply").headers["Content-Type"] == "model/ply"
    assert len(splat) == 32 * len(ply)
    assert len(spz) < len(splat)


def colour_at(picture: UInt8Array, wanted: int) -> tuple[float, float]:
    """Middle (x, y) of the pixels in which one of red, green and blue rules."""
    pixels = picture.astype(int)
    rest = np.delete(pixels, wanted, axis=2).max(axis=2)
    rows, columns = np.nonzero(pixels[..., wanted] - rest > 60)
    assert len(rows) > 20, f"channel {wanted} is not to be seen"
    return float(columns.mean()), float(rows.mean())


def test_a_picture_from_the_front_shows_x_to_the_right_and_z_up(client: httpx.Client, arms: bytes) -> None:
    answer = decoded(client, arms, "image/png", azimuth=0, elevation=10, side=128)
    picture = decode_image(answer.content, Limits()).pixels
    assert picture.shape == (128, 128, 3)
    assert picture[0, 0].tolist() == [255, 255, 255]
    red, blue = colour_at(picture, 0), colour_at(picture, 2)
    assert red[0] > 64, "the red arm points to +x"
    assert blue[1] < red[1], "the blue arm stands on the red one"
    black = decoded(client, arms, "image/png", azimuth=90, elevation=10, side=96, background="black")
    other = decode_image(black.content, Limits()).pixels
    assert other[0, 0].tolist() == [0, 0, 0]
    assert colour_at(other, 1)[0] > 48, "seen from +x, +y is to the right"


def object_pixels(client: httpx.Client, tokens: bytes, accept: str, **options: Any) -> int:
    """How many pixels of the first frame are not of the white ground."""
    data = decoded(client, tokens, accept, azimuth=20, elevation=10, side=128, **options).content
    frame = decode_image(data, Limits()).pixels if accept == "image/png" else decode_video(data, Limits()).frames[0]
    return int((frame < 230).any(axis=2).sum())


@pytest.mark.parametrize(("accept", "options"), [("image/png", {}), ("video/x-matroska", {"frames": 2})])
def test_distance_and_angle_of_view(client: httpx.Client, block: bytes, accept: str, options: dict[str, int]) -> None:
    far, near, narrow = (
        object_pixels(client, block, accept, distance=distance, fov=fov, **options)
        for distance, fov in ((4, 40), (2, 40), (4, 20))
    )
    assert far > 100
    assert 3 < near / far < 6, "from half the way it is twice as wide"
    assert 3 < narrow / far < 6, "at half the angle it is twice as wide"


def test_a_turntable(client: httpx.Client, arms: bytes) -> None:
    clip = decode_video(decoded(client, arms, "video/mp4", frames=6, side=64).content, Limits())
    assert clip.frames.shape == (6, 64, 64, 3)
    change = np.abs(clip.frames[0].astype(int) - clip.frames[3]).mean()
    assert change > 3


def test_arrays_are_still_to_be_had(client: httpx.Client, arms: bytes) -> None:
    [entry] = decoded(client, arms, "application/json").json()["items"]
    assert entry["kind"] == "voxels"
    assert entry["feats"]["shape"] == [len(load_tokens(arms)[0]), 768]


def test_the_cameras_of_the_comparison_are_none_of_those_that_made_the_voxels() -> None:
    asset = decode_asset(meshes.arms_glb(), "glb", Limits(), with_pictures=True)
    assert asset.pictures is not None
    axes, others = (
        poses[:, 2, :3] for poses in (asset.pictures.world_to_camera, sphere_cameras(VIEWS).world_to_camera)
    )
    apart = np.degrees(np.arccos(np.clip(axes @ others.T, -1, 1))).min(axis=1)
    assert (len(apart), asset.pictures.held_out) == (6, True)
    assert apart.min() > 3, apart


def test_reconstruction_is_compared_with_views_that_were_held_out(client: httpx.Client) -> None:
    options = {"outputs": "latents,reconstruction"}
    [entry] = client.post("/encode", content=meshes.arms_glb(), params=options).json()["items"]
    found = entry["reconstruction"]
    assert (found["media_type"], found["views"], found["held_out"]) == ("model/ply", 6, True)
    assert found["psnr_db"] > 16
    assert 0.4 < found["ssim"] < 1
    assert found["note"], "what to know of the bundled decoder"
    assert arms_in_place(decode_ply(base64.b64decode(found["data"])))
    alone = client.post(
        "/encode", content=meshes.arms_glb(), params={"outputs": "reconstruction"}, headers={"Accept": "model/ply"}
    )
    assert arms_in_place(decode_ply(alone.content))


def test_renders_as_a_zip_and_as_parts_give_the_same(client: httpx.Client) -> None:
    members = files()
    as_zip = tokens_of(client, meshes.zipped(members))
    parts = [("file", (name, data)) for name, data in members.items()]
    answer = client.post("/encode", files=parts, headers={"Accept": TOKEN_FILE})
    assert answer.status_code == 200, answer.text
    one, other = load_tokens(as_zip)[0], load_tokens(answer.content)[0]
    assert np.array_equal(one.coords, other.coords)
    assert one.latents is not None
    assert other.latents is not None
    np.testing.assert_allclose(one.latents, other.latents, atol=1e-5)
    given = client.post("/encode", content=meshes.zipped(members), params={"outputs": "reconstruction"}).json()
    assert given["items"][0]["reconstruction"]["held_out"] is False


def test_3d_beside_a_picture_in_one_request_and_embeddings(client: httpx.Client) -> None:
    picture = meshes.png(np.full((40, 40, 3), 90, np.uint8))
    parts = [
        ("file", ("a.glb", meshes.arms_glb())),
        ("file", ("b.png", picture)),
        ("file", ("c.obj", b"v 0 0 0\nf 1 1 1")),
    ]
    items = client.post("/embed", files=parts, data={"floats": "true"}).json()["items"]
    assert [item["status"] for item in items] == ["ok", "ok", "error"]
    assert [item.get("kind") for item in items] == ["voxels", "image", None]
    assert items[2]["error"]["code"] == "empty_object"
    assert np.linalg.norm(items[0]["embedding"]) == pytest.approx(1, abs=1e-4)


def test_up_is_an_option_and_told(client: httpx.Client) -> None:
    [guess] = client.post("/encode", content=meshes.arms_ply()).json()["items"]
    assert any("z is taken to be up" in note for note in guess["notes"])
    flat, upright = (load_tokens(tokens_of(client, meshes.arms_ply(), up=up))[0] for up in "yz")
    assert not np.array_equal(flat.coords, upright.coords)


def test_several_decoded_at_once(client: httpx.Client, arms: bytes) -> None:
    body = {"items": [{"data": base64.b64encode(arms).decode()}, {"data": base64.b64encode(arms).decode()}]}
    answer = client.post("/decode", json=body, headers={"Accept": "multipart/mixed"})
    assert answer.status_code == 200, answer.text
    assert answer.content.count(b"Content-Type: model/ply") == 2


def test_every_answer_says_what_3d_is_worth(client: httpx.Client, block: bytes) -> None:
    cards = client.get("/v1/models").json()["data"]
    [note] = {card["gaussian_decoder"]["note"] for card in cards}
    for words in ("small", "39 meshes", "22.1 dB", "not to be compared"):
        assert words in note
    wanted = f"3D comes back through tiny-splats: {note}"
    for accept in ("model/ply", "application/octet-stream", "image/png", "video/mp4", "application/json"):
        assert decoded(client, block, accept, side=32, frames=2).headers["Atoken-Note"] == wanted
    mesh = meshes.box((0, 0, 0), (0.5, 0.02, 0.02)).export(file_type="glb")
    answer = client.post("/encode", content=mesh)
    assert answer.headers["Atoken-Note"] == wanted
    assert wanted in answer.json()["items"][0]["notes"]
    as_file = client.post("/encode", content=mesh, headers={"Accept": TOKEN_FILE})
    assert as_file.headers["Atoken-Note"] == wanted


def test_pictures_and_embeddings_say_nothing_of_3d(client: httpx.Client) -> None:
    answer = client.post("/encode", content=meshes.png(np.full((40, 40, 3), 90, np.uint8)))
    assert answer.json()["items"][0]["notes"] == []
    back = client.post("/decode", json=answer.json(), headers={"Accept": "image/png"})
    assert back.status_code == 200
    voxels = npz(coords=np.array([[1, 2, 3]]), feats=np.zeros((1, 768), np.uint8))
    embedded = client.post("/embed", content=voxels)
    assert embedded.json()["items"][0]["notes"] == []
    assert not any("Atoken-Note" in given.headers for given in (answer, back, embedded))


def test_codes_of_3d(client: httpx.Client) -> None:
    tokens = tokens_of(client, meshes.arms_glb(), model="tiny-discrete", outputs="codes")
    [item] = load_tokens(tokens)
    assert item.codes is not None
    assert len(item.codes) == len(item) > 4000
    assert np.ptp(item.codes.astype(int), axis=0).min() > 100, "they say something"
    back = decoded(client, tokens, "model/ply")
    assert back.headers["Atoken-Model"] == "tiny-discrete"
    gaussians = decode_ply(back.content)
    assert len(gaussians) == 32 * len(item)
    assert arms_in_place(gaussians)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"azimuth": "800"}, "azimuth"),
        ({"side": "5000"}, "side"),
        ({"format": "usd"}, "format"),
        ({"frames": "1"}, "frames"),
        ({"frames": "100", "side": "900"}, "81000000 pixels"),
        ({"background": "pink"}, "background"),
    ],
)
def test_cameras_that_are_none(client: httpx.Client, arms: bytes, options: dict[str, str], words: str) -> None:
    answer = client.post("/decode", content=arms, params=options, headers={"Content-Type": TOKEN_FILE})
    assert answer.status_code == 422
    assert words in answer.json()["detail"]


def drawing(data: bytes, azimuth: float, side: int) -> UInt8Array:
    """The mesh itself, on white, as /decode would draw it: uint8 [side, side, 3]."""
    format, limits = asset_format(data) or "", Limits()
    read = load_mesh_archive(open_archive(data, limits), limits) if format == "zip" else load_mesh(data, format, limits)
    pose, lens = (matrix.numpy()[None] for matrix in look_at(azimuth, 20, 2, 40))
    [seen] = render_views(normalize(read), Cameras(world_to_camera=pose, intrinsics=lens), side).images
    return np.where(seen[..., 3:] > 0, seen[..., :3], np.uint8(255))


@needs_data
@pytest.mark.parametrize(
    ("name", "least"),
    [("blendswap_cc_by_horse.glb", 19.5), ("blendswap_cc_by_toytrain.zip", 17), ("pv_ant.ply", 17.5)],
)
def test_real_meshes_the_whole_way(client: httpx.Client, name: str, least: float) -> None:
    data = (DATA / "meshes" / "eval" / name).read_bytes()
    tokens = tokens_of(client, data)
    for azimuth in (30, 120):
        view = decoded(client, tokens, "image/png", azimuth=azimuth, elevation=20, side=128)
        picture, wanted = decode_image(view.content, Limits()).pixels, drawing(data, azimuth, 128)
        assert psnr(picture, wanted) > least
        for flipped in (picture[:, ::-1], picture[::-1]):
            assert psnr(picture, wanted) > psnr(flipped, wanted) + 2


def psnr(picture: UInt8Array, wanted: UInt8Array) -> float:
    """In dB."""
    return float(10 * np.log10(255**2 / np.square(picture.astype(float) - wanted).mean()))
