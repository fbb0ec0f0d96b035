"""A stored sample to an item of the size that a stage wants. Everything random comes from the generator given.

Source of the rules: facts-training 5. Pictures are resized with antialias, where the published code has none.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import PIL.Image

from media.decode import decode_media
from media.limits import Limits
from media.types import Asset, Image, UInt8Array, Video, Voxels
from media.video import iter_video
from training.batches import Kind, Sample
from training.shards import Record
from training.stages import Stage

PATCH = 16
LIMITS = Limits.local()
BILINEAR = PIL.Image.Resampling.BILINEAR


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
    frames, fps = _clip(record.media, kind, stage, rng)
    return Sample(Video(frames=fitted(frames, stage.video_side, rng), fps=fps), record.caption)


def fitted(frames: UInt8Array, sides: tuple[int, int], rng: np.random.Generator) -> UInt8Array:
    """Frames [T, H, W, 3] at a random size within `sides`, and a random cut to whole patches.

    Never enlarged, but where a side is under the least.
    """
    height, width = frames.shape[1:3]
    scale = random_scale(height, width, sides, rng)
    size = (max(PATCH, round(height * scale)), max(PATCH, round(width * scale)))
    if size != (height, width):
        resized = (PIL.Image.fromarray(frame).resize(size[::-1], BILINEAR) for frame in frames)
        frames = np.stack([np.asarray(frame) for frame in resized])
    rows, columns = (side // PATCH * PATCH for side in size)
    top, left = (int(rng.integers(side - cut + 1)) for side, cut in zip(size, (rows, columns), strict=True))
    return np.ascontiguousarray(frames[:, top : top + rows, left : left + columns])


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


def _clip(data: bytes, kind: Kind, stage: Stage, rng: np.random.Generator) -> tuple[UInt8Array, float | None]:
    """Frames of one use and their rate. For reconstruction a random length and stride; for words one a second."""
    with iter_video(io.BytesIO(data), LIMITS) as reader:
        if kind == "video_sem":
            frames = list(_one_a_second(reader, reader.fps or 24.0, stage.clip_frames))
            if not frames:
                raise ValueError("a clip without frames")
            whole = frames + [frames[-1]] * (-len(frames) % 4)
            return np.stack(whole), 1.0
        count = int(rng.choice(stage.frames))
        stride = int(rng.integers(stage.strides[0], stage.strides[1] + 1))
        window = [frame for _, frame in zip(range(count * stage.strides[1] * 2), reader, strict=False)]
        fps = reader.fps
    if len(window) < 4:
        raise ValueError(f"a clip of {len(window)} frames; wanted 4 or more")
    stride = max(1, min(stride, (len(window) - 1) // max(1, count - 1)))
    count = min(count, 1 + (len(window) - 1) // stride) // 4 * 4
    start = int(rng.integers(len(window) - stride * (count - 1)))
    return np.stack(window[start : start + stride * (count - 1) + 1 : stride]), fps and fps / stride


def _one_a_second(frames: Iterator[UInt8Array], fps: float, most: int) -> Iterator[UInt8Array]:
    """The frames nearest to every full second, at most so many."""
    taken = 0
    for index, frame in enumerate(frames):
        if index >= round(taken * fps):
            yield frame
            taken += 1
            if taken == most:
                return
