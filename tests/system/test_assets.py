"""3D through the whole service: meshes, renders and voxels in; Gaussian files, pictures and turntables out."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from media.image import decode_image
from media.limits import Limits
from media.ply import decode_ply
from media.splat32 import decode_splat
from media.spz import decode_spz
from media.tokens import load_tokens
from media.types import Gaussians, UInt8Array
from media.video import decode_video
from tests.media import meshes
from tests.media.posed import ARMS
from tests.media.test_renders import files
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


def test_a_turntable(client: httpx.Client, arms: bytes) -> None:
    clip = decode_video(decoded(client, arms, "video/mp4", frames=6, side=64).content, Limits())
    assert clip.frames.shape == (6, 64, 64, 3)
    change = np.abs(clip.frames[0].astype(int) - clip.frames[3]).mean()
    assert change > 3


def test_arrays_are_still_to_be_had(client: httpx.Client, arms: bytes) -> None:
    [entry] = decoded(client, arms, "application/json").json()["items"]
    assert entry["kind"] == "voxels"
    assert entry["feats"]["shape"] == [len(load_tokens(arms)[0]), 768]


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


def test_the_card_says_what_makes_the_gaussians(client: httpx.Client) -> None:
    answer = json.dumps(client.get("/v1/models").json())
    assert "tiny-splats" in answer


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


@needs_data
@pytest.mark.parametrize("name", ["blendswap_cc_by_horse.glb", "blendswap_cc_by_toytrain.zip", "pv_ant.ply"])
def test_real_meshes_the_whole_way(client: httpx.Client, name: str, tmp_path: Path) -> None:
    tokens = tokens_of(client, (DATA / "meshes" / "eval" / name).read_bytes())
    picture = decode_image(decoded(client, tokens, "image/png", side=64).content, Limits()).pixels
    assert (picture != 255).any()
