"""Stored samples to items: sizes, clips in little memory, what is refused."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest

from media.errors import MediaError
from media.types import Image, Video, Voxels
from media.video import encode_video
from tests.training.shard_files import STAGE, picture
from training.generated import Generated
from training.samples import fitted, random_scale, sample_of, voxels_bytes
from training.shard_file import Record


@pytest.mark.parametrize("size", [(40, 56), (300, 90), (17, 500), (64, 64)])
def test_sizes_of_pictures(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (1, *size, 3), dtype=np.uint8)
    for _ in range(20):
        scale = random_scale(*size, (32, 128), rng)
        assert scale <= max(1.0, 32 / min(size))
        cut = fitted(frames, (32, 128), rng)
        height, width = cut.shape[1:3]
        assert height % 16 == width % 16 == 0
        assert max(height, width) <= 128
        assert min(height, width) >= (16 if max(size) / min(size) > 4 else 32)
    whole = rng.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fitted(whole, (32, 64), rng), whole)


def test_clips_and_assets() -> None:
    clip = Generated(sides=(64, 64), frames=(40,)).draw("video_rec", [0])[0].item
    assert isinstance(clip, Video)
    film = Record("f", "mkv", encode_video(clip.frames, 8.0, "mkv"), "a film")
    rng = np.random.default_rng(0)
    lengths = set()
    for _ in range(12):
        video = sample_of(film, "video_rec", STAGE, rng).item
        assert isinstance(video, Video)
        lengths.add(len(video.frames))
        assert max(video.frames.shape[1:3]) <= 32
    assert lengths == {4, 8}
    voxels = Generated().draw("asset_rec", [0])[0].item
    assert isinstance(voxels, Voxels)
    back = sample_of(Record("v", "safetensors", voxels_bytes(voxels), ""), "asset_rec", STAGE, rng).item
    assert isinstance(back, Voxels)
    np.testing.assert_array_equal(back.coords, voxels.coords)
    np.testing.assert_allclose(back.feats, voxels.feats, atol=0.5 / 255 + 1e-6)
    image = sample_of(Record("i", "png", picture(0), ""), "image_rec", STAGE, rng).item
    assert isinstance(image, Image)
    with pytest.raises(MediaError, match="declared as 'image' but is a video"):
        sample_of(film, "image_rec", STAGE, rng)


@pytest.mark.parametrize("container", ["mp4", "mkv"])  # the first says how many frames it has, the second does not
@pytest.mark.parametrize("count", [3, 4, 5, 9, 30, 200])
def test_clips_of_any_length(container: str, count: int) -> None:
    """Frame n is n bright: which ones were taken can be seen."""
    stage = replace(STAGE, video_side=(16, 16), frames=(8,), strides=(1, 4))
    frames = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 16, 16, 3))
    film = Record("f", container, encode_video(np.ascontiguousarray(frames), 8.0, container), "")  # type: ignore[arg-type]
    if count < 4:
        with pytest.raises(ValueError, match="a clip of 3 frames; wanted 4 or more"):
            sample_of(film, "video_rec", stage, np.random.default_rng(0))
        return
    strides, starts = set(), set()
    for seed in range(12):
        video = sample_of(film, "video_rec", stage, np.random.default_rng(seed)).item
        assert isinstance(video, Video)
        assert len(video.frames) == (8 if count >= 8 else 4)
        seen = video.frames[:, 0, 0, 0].astype(int)
        if container == "mkv":  # without loss
            strides |= set(np.diff(seen))
            assert len(set(np.diff(seen))) == 1
            assert video.fps == pytest.approx(8.0 / (seen[1] - seen[0]))
            starts.add(int(seen[0]))
            assert seen[-1] < min(count, 64)
    if container == "mkv" and count == 200:
        assert strides == {1, 2, 3, 4}
        assert max(starts) > 30


@pytest.mark.parametrize(
    ("count", "fps", "most", "taken"),
    [
        (40, 8.0, 64, [0, 8, 16, 24, 32, 32, 32, 32]),  # 5 seconds, filled up to whole patches with the last
        (30, 2.5, 64, [0, 2, 5, 8, 10, 12, 15, 18, 20, 22, 25, 28]),
        (200, 2.0, 64, [*range(0, 128, 2)]),
        (200, 1.0, 8, [*range(8)]),
        (5, 8.0, 64, [0, 0, 0, 0]),
    ],
)
def test_an_understanding_clip_has_a_frame_a_second(count: int, fps: float, most: int, taken: list[int]) -> None:
    """Frame n is n bright, without loss: which ones were taken can be seen."""
    stage = replace(STAGE, video_side=(16, 16), clip_frames=most)
    frames = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 16, 16, 3))
    film = Record("f", "mkv", encode_video(np.ascontiguousarray(frames), fps, "mkv"), "")
    video = sample_of(film, "video_sem", stage, np.random.default_rng(0)).item
    assert isinstance(video, Video)
    assert video.frames[:, 0, 0, 0].tolist() == taken
    assert video.fps == 1.0
    assert (video.frames == video.frames[:, :1, :1, :1]).all()


@pytest.mark.parametrize("kind", ["video_rec", "video_sem"])
def test_a_long_clip_is_never_in_memory_whole(kind: str) -> None:
    """300 frames of 320 x 240 are 69 MB; as published, 384 at the largest stride are looked at."""
    stage = replace(STAGE, frames=(16,), strides=(1, 12), clip_frames=64)
    frames = np.zeros((300, 240, 320, 3), np.uint8)
    film = Record("f", "mp4", encode_video(frames, 8.0, "mp4"), "")
    del frames
    tracemalloc.start()
    try:
        sample_of(film, kind, stage, np.random.default_rng(0))  # type: ignore[arg-type]
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


def test_a_picture_that_would_fill_the_memory_is_refused() -> None:
    """A small file that says 30 000 x 30 000 pixels: 2.7 GB, times the workers."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = picture(0)
    data = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    with pytest.raises(MediaError, match="at most 200000000 pixels are allowed"):
        sample_of(Record("b", "png", data, ""), "image_rec", STAGE, np.random.default_rng(0))
