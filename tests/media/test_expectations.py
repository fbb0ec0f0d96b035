"""Every odd and bad file of the shared set, through probe and decode_media in the pool."""

import asyncio
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from media.decode import decode_media
from media.errors import MediaError
from media.image import decode_image
from media.limits import Limits
from media.pool import MediaPool
from media.sniff import probe
from media.types import Asset, Image, Item, UInt8Array, Video
from tests.paths import DATA, needs_data

pytestmark = needs_data

LIMITS = Limits()
# No file of the set needs more memory than this on top of the libraries, nor more time, busy machine included.
MEMORY_BYTES, SECONDS = 320 * 2**20, 20.0

NOT_OFFERED = (".tiff", ".bmp", ".ppm", ".jp2", ".heic", "prores.mov")
REFUSED = ("audio_only.mp4", "audio_only.m4a", "no_frames.mp4", "truncated.mp4", "truncated_no_moov.mp4")
ASSETS = (".obj", ".zip", ".ply", ".stl", ".off", ".glb", ".gltf", ".npz")
# Broken token files: as voxels they are as broken. Texts and arrays are in no format that is offered.
TOKEN_FILES, OTHER_KINDS = (".safetensors",), (".npy", ".json", ".txt")
# Where the text leaves a choice; each with the rule that we chose.
CHOSEN = {"bad/not_zip.zip": 415}
# A comment alone may be anything: senders say what they send.
DECLARED = {".obj": "model/obj"}
NAMED = {
    "bad/empty.obj": ("empty_object", "no faces"),
    "bad/stl_claims_4e9.stl": ("item_too_large", "4294967295 faces"),
}


def rows(part: str) -> list[Any]:
    if not DATA.is_dir():
        return []
    found: list[dict[str, Any]] = json.loads((DATA / "expectations.json").read_text("utf-8"))[part]
    return [pytest.param(row, id=row["path"]) for row in found]


@dataclass
class Outcome:
    item: Item | Asset | None
    error: MediaError | None
    seconds: float


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """Path -> what came of it; one pool for all files, as in the service."""

    async def decode_all() -> dict[str, Outcome]:
        results: dict[str, Outcome] = {}
        limits = Limits(child_memory_bytes=MEMORY_BYTES, child_wall_s=SECONDS)
        async with MediaPool(limits, 2) as pool:
            await pool.start()
            for part in ("images_odd", "videos_odd", "bad"):
                for parameter in rows(part):
                    path = parameter.values[0]["path"]
                    start = time.monotonic()
                    item, error = None, None
                    try:
                        item = await pool.run(
                            decode_media, (DATA / path).read_bytes(), LIMITS, DECLARED.get(Path(path).suffix)
                        )
                    except MediaError as caught:
                        error = caught
                    results[path] = Outcome(item, error, time.monotonic() - start)
        return results

    return asyncio.run(decode_all())


def pixels_of(outcome: Outcome) -> UInt8Array:
    assert outcome.error is None, outcome.error
    assert isinstance(outcome.item, Image)
    return outcome.item.pixels


def allowed(expect: str) -> set[int]:
    statuses = {int(number) for number in re.findall(r"\b(?:200|400|413|415|422)\b", expect)}
    return statuses | ({400, 413, 415, 422} if "4xx" in expect else set())


@pytest.mark.parametrize("row", rows("images_odd"))
def test_odd_images(row: dict[str, str], outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[row["path"]]
    if row["path"].endswith(NOT_OFFERED):
        assert outcome.error is not None
        assert outcome.error.code == "unsupported_media_type"
        assert 415 in allowed(row["expect"])
        return
    size = re.search(r"(\d+)x(\d+)", row["expect"]) or re.search(r"(\d+)x(\d+)", row["what"])
    # One row names no size; it is the same picture as its neighbours'.
    width, height = (int(size[1]), int(size[2])) if size else (320, 240)
    pixels = pixels_of(outcome)
    assert pixels.shape == (height, width, 3)
    assert pixels.dtype == np.uint8
    header = probe((DATA / row["path"]).read_bytes(), LIMITS)
    assert (header.height, header.width) == (height, width)
    assert header.tokens == -(-height // 16) * -(-width // 16)


@pytest.mark.parametrize("row", rows("videos_odd"))
def test_odd_videos(row: dict[str, str], outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[row["path"]]
    if row["path"].endswith((*REFUSED, *NOT_OFFERED)):
        assert outcome.error is not None
        code = "unsupported_codec" if row["path"].endswith(NOT_OFFERED) else "corrupt_media"
        assert outcome.error.code == code
        assert outcome.error.status in allowed(row["expect"])
        return
    measured = re.search(r"decodes to (\d+) frames (\d+)x(\d+)", row["measured_with_pyav"])
    assert measured is not None
    count, width, height = (int(number) for number in measured.groups())
    if row["path"].endswith(".gif"):
        assert pixels_of(outcome).shape == (height, width, 3)
        assert isinstance(outcome.item, Image)
        assert outcome.item.notes == (f"first of {count} frames",)
        return
    if row["path"].endswith("rotated_90.mp4"):
        width, height = height, width
    assert outcome.error is None, outcome.error
    assert isinstance(outcome.item, Video)
    assert outcome.item.frames.shape == (count, height, width, 3)
    assert outcome.item.fps is not None
    header = probe((DATA / row["path"]).read_bytes(), LIMITS)
    assert (header.frames, header.height, header.width) == (count, height, width)


@pytest.mark.parametrize("row", rows("bad"))
def test_bad_files(row: dict[str, str], outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[row["path"]]
    assert outcome.seconds < SECONDS
    if row["path"].endswith(OTHER_KINDS):
        assert outcome.error is not None
        assert outcome.error.code == "unsupported_media_type"
        return
    if row["path"].endswith((*ASSETS, *TOKEN_FILES)):
        if outcome.error is None:
            assert 200 in allowed(row["expect"])
            assert isinstance(outcome.item, Asset)
            assert len(outcome.item.voxels.coords) > 0
        else:
            chosen = CHOSEN.get(row["path"])
            assert outcome.error.status in ({chosen} if chosen else allowed(row["expect"])), outcome.error
            assert outcome.error.code != "decode_limit"
            code, words = NAMED.get(row["path"], (outcome.error.code, ""))
            assert (outcome.error.code, words in outcome.error.detail) == (code, True), outcome.error
        return
    if outcome.error is None:
        assert 200 in allowed(row["expect"])
        assert isinstance(outcome.item, Video)
        assert outcome.item.frames.shape == (1, 136, 320, 3)
        return
    assert outcome.error.status in allowed(row["expect"]), outcome.error
    assert outcome.error.code in ("corrupt_media", "unsupported_media_type", "image_too_large", "too_many_frames")
    assert "/" not in outcome.error.detail.replace("MP4/MOV, WebM/Matroska", "")


def test_exif_variants_show_the_same_picture(outcomes: dict[str, Outcome]) -> None:
    first = pixels_of(outcomes["images/odd/exif_1.jpg"]).astype(int)
    for number in range(2, 9):
        other = pixels_of(outcomes[f"images/odd/exif_{number}.jpg"])
        # Each was compressed for itself, lying as it does.
        assert np.abs(other - first).mean() < 4
        assert np.abs(other[::-1] - first).mean() > 20


def test_variants_of_one_picture_agree(outcomes: dict[str, Outcome]) -> None:
    plain = pixels_of(outcomes["images/odd/png_named.jpg"]).astype(int)
    for name, tolerance in (
        ("rgb16.png", 0.0),
        ("lossless.webp", 0.0),
        ("cmyk.jpg", 4.0),
        ("icc_srgb.jpg", 4.0),
        ("img.avif", 5.0),
        ("trailing_bytes.jpg", 5.0),
    ):
        assert np.abs(pixels_of(outcomes[f"images/odd/{name}"]) - plain).mean() <= tolerance, name
    grey = pixels_of(outcomes["images/odd/gray16.png"]).astype(int)
    assert (grey[..., :1] == grey).all()
    assert np.abs(grey[..., 0] - plain @ [0.299, 0.587, 0.114]).mean() < 1.5


def test_transparent_pixels_are_white(outcomes: dict[str, Outcome]) -> None:
    pixels = pixels_of(outcomes["images/odd/rgba.png"])
    assert (pixels[0, 0] == 255).all()
    for name in ("rgba.png", "palette_transparency.png", "photo_alpha.png"):
        item = outcomes[f"images/odd/{name}"].item
        assert item is not None
        assert "transparency laid over white" in item.notes


def test_a_profile_of_linear_light_is_converted(outcomes: dict[str, Outcome]) -> None:
    # Taken as sRGB the picture would be nearly black (mean 9).
    assert pixels_of(outcomes["images/odd/icc_rec2020_linear_16bit.png"]).mean() > 30


def test_grey_clip_has_equal_channels(outcomes: dict[str, Outcome]) -> None:
    item = outcomes["videos/odd/gray.mp4"].item
    assert isinstance(item, Video)
    assert (item.frames == item.frames[..., :1]).all()


def test_the_eval_and_train_pictures_decode() -> None:
    for path in sorted((DATA / "images/eval").iterdir())[::5]:
        image = decode_image(path.read_bytes(), Limits.local())
        assert image.pixels.std() > 1
