"""A stored sample to an item of the size that a stage wants. Everything random comes from the generator given.

Source of the rules: facts-training 5. Pictures are resized with antialias, where the published code has none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import PIL.Image

from media.decode import decode_media
from media.limits import GIB, Limits
from media.types import Asset, Image, UInt8Array, Video, Voxels
from media.video import iter_video
from training.batches import Kind, Sample
from training.shard_file import Record
from training.stages import Stage

PATCH = 16
PATCH_FRAMES = 4
BILINEAR = PIL.Image.Resampling.BILINEAR

LIMITS = replace(
    Limits.local(),
    # Shards are full of strangers' files, and several are decoded at a time: 200 million pixels, the largest that
    # telephones take, are 600 MB.
    image_pixels=200_000_000,
    # 8K.
    frame_pixels=33_554_432,
    video_bytes=GIB,
    mesh_bytes=GIB,
    archive_bytes=GIB,
    archive_unpacked_bytes=2 * GIB,
    decode_bytes=2 * GIB,
)
"""Of what is decoded for training; training.prepare leaves out the rest."""


def sample_of(record: Record, kind: Kind, stage: Stage, rng: np.random.Generator) -> Sample:
    """Decode a record for one kind of use.

    Raises MediaError for what cannot be decoded, ValueError for media of another kind than asked for, or too short.
    """
    if kind in ("asset_rec", "asset_sem"):
        asset = decode_media(record.media, LIMITS, "asset" if record.suffix != "safetensors" else None)
        if not isinstance(asset, Asset):
            raise ValueError(f"a {asset.kind} among the assets")
        return Sample(asset.voxels, record.caption)
    if kind in ("distill", "image_rec"):
        image = decode_media(record.media, LIMITS, "image")
        assert isinstance(image, Image)
        return Sample(Image(pixels=fitted(image.pixels[None], stage.image_side, rng)[0]), record.caption)
    if kind == "video_sem":
        return Sample(_spoken_clip(record.media, stage, rng), record.caption)
    return Sample(_clip(record.media, stage, rng), record.caption)


def fitted(frames: UInt8Array, sides: tuple[int, int], rng: np.random.Generator) -> UInt8Array:
    """Frames [T, H, W, 3] at a random size within `sides`, and a random cut to whole patches.

    Never enlarged, but where a side is under the least.
    """
    fit = fit_of(frames.shape[1], frames.shape[2], sides, rng)
    return np.stack([fit(frame) for frame in frames])


def fit_of(
    height: int, width: int, sides: tuple[int, int], rng: np.random.Generator
) -> Callable[[UInt8Array], UInt8Array]:
    """What `fitted` does to each frame of this size."""
    scale = random_scale(height, width, sides, rng)
    size = (max(PATCH, round(height * scale)), max(PATCH, round(width * scale)))
    rows, columns = (side // PATCH * PATCH for side in size)
    top, left = (int(rng.integers(side - cut + 1)) for side, cut in zip(size, (rows, columns), strict=True))

    def fit(frame: UInt8Array) -> UInt8Array:
        if size != (height, width):
            frame = np.asarray(PIL.Image.fromarray(frame).resize(size[::-1], BILINEAR))
        return np.ascontiguousarray(frame[top : top + rows, left : left + columns])

    return fit


def random_scale(height: int, width: int, sides: tuple[int, int], rng: np.random.Generator) -> float:
    """Factor of both sides: for each a draw from (least / side) to 1, the smaller if it leaves both at the least."""
    least, most = sides
    shorter, longer = min(height, width), max(height, width)
    if shorter <= least:
        scale = least / shorter
    else:
        draws = sorted(float(rng.uniform(least / side, 1)) for side in (height, width))
        scale = draws[0] if shorter * draws[0] >= least else draws[1]
    return min(scale, most / longer)


def voxels_bytes(voxels: Voxels) -> bytes:
    """A voxel set as a safetensors file of 8 bits a value: what prepare stores, what services take."""
    from safetensors.numpy import save

    feats = np.rint(voxels.feats * 255).astype(np.uint8)
    return save({"coords": voxels.coords.astype(np.uint8), "feats": feats})


def _clip(data: bytes, stage: Stage, rng: np.random.Generator) -> Video:
    """A random number of frames at a random stride, from a random place near the beginning."""
    count = int(rng.choice(stage.frames))
    stride = int(rng.integers(stage.strides[0], stage.strides[1] + 1))
    where = float(rng.random())
    window = 2 * count * stage.strides[1]
    length = window
    # Only what is kept is held, and most of it small: a window of 768 frames of 1080p is 5 GB. How long the clip is
    # has to be known for that; where its header does not say it (in truth), it is known after one reading.
    for _ in range(2):
        with iter_video(data, LIMITS) as reader:
            length = min(length, reader.header.frames or length)
            if length < PATCH_FRAMES:
                raise ValueError(f"a clip of {length} frames; wanted {PATCH_FRAMES} or more")
            taken_stride = max(1, min(stride, (length - 1) // max(1, count - 1)))
            taken = min(count, 1 + (length - 1) // taken_stride) // PATCH_FRAMES * PATCH_FRAMES
            start = int(where * (length - taken_stride * (taken - 1)))
            read = itertools.count()
            frames = (frame for frame, _ in zip(reader, read, strict=False))
            chosen = itertools.islice(frames, start, start + taken_stride * (taken - 1) + 1, taken_stride)
            kept = list(_fitted_one_by_one(chosen, stage.video_side, rng))
            if len(kept) == taken:
                return Video(frames=np.stack(kept), fps=reader.fps and reader.fps / taken_stride)
            length = min(window, next(read))
    raise ValueError("a clip that has another length each time it is read")


def _spoken_clip(data: bytes, stage: Stage, rng: np.random.Generator) -> Video:
    """A frame for every second, filled up to whole patches with the last."""
    with iter_video(data, LIMITS) as reader:
        seconds = _one_a_second(reader, reader.fps or 24.0, stage.clip_frames)
        frames = list(_fitted_one_by_one(seconds, stage.video_side, rng))
    return Video(frames=np.stack(frames + [frames[-1]] * (-len(frames) % PATCH_FRAMES)), fps=1.0)


def _fitted_one_by_one(
    frames: Iterator[UInt8Array], sides: tuple[int, int], rng: np.random.Generator
) -> Iterator[UInt8Array]:
    fit: Callable[[UInt8Array], UInt8Array] | None = None
    for frame in frames:
        fit = fit or fit_of(frame.shape[0], frame.shape[1], sides, rng)
        yield fit(frame)


def _one_a_second(frames: Iterator[UInt8Array], fps: float, most: int) -> Iterator[UInt8Array]:
    """The frames nearest to every full second, at most so many."""
    taken = 0
    for index, frame in enumerate(frames):
        if index >= round(taken * fps):
            yield frame
            taken += 1
            if taken == most:
                return
