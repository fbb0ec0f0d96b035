"""What a protocol is run over: the pictures, clips or assets of a folder, each at the size that the model will see.

T frames, H x W pixels. A file that cannot be read is an error: a score over fewer items would be another score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from media.errors import MediaError
from media.limits import Limits
from media.types import UInt8Array
from media.video import iter_video
from training.data import IMAGE_SUFFIXES, VIDEO_SUFFIXES, flatten, read_picture
from training.protocols import Kind, Protocol

LIMITS = Limits.local()
VOXEL_SUFFIXES = {".safetensors", ".npz"}
SUFFIXES: dict[Kind, set[str]] = {
    "image": IMAGE_SUFFIXES,
    "video": VIDEO_SUFFIXES | {".mov", ".m4v"},
    "asset": {".glb", ".gltf", ".obj", ".ply", ".stl", ".off", ".zip"} | VOXEL_SUFFIXES,
}
SMALLEST = 16
"""Side of a patch: nothing smaller is scored."""


@dataclass(frozen=True)
class Found:
    """The items of a folder. paths: files, or folders of frames; total: how many there were before the limit."""

    kind: Kind
    paths: tuple[Path, ...]
    total: int

    def __str__(self) -> str:
        count = len(self.paths)
        return f"n = {count:,}" if count == self.total else f"n = {count:,} of {self.total:,} files, evenly spaced"


def find_items(folder: Path, kind: Kind | None, limit: int | None = None) -> Found:
    """Files of a kind under a folder, by name; kind None: of the only kind there is. Folders of frames are clips too.

    Raises FileNotFoundError where there is none, ValueError for several kinds where none is given, and for a limit
    under 1.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if kind is None:
        kinds: list[Kind] = [name for name, ends in SUFFIXES.items() if any(_ends(path, ends) for path in files)]
        if len(kinds) > 1:
            raise ValueError(f"{folder} holds {' and '.join(kinds)} files; name a folder of one kind, or the kind")
        kind = kinds[0] if kinds else "image"
    found = [path for path in files if _ends(path, SUFFIXES[kind])]
    if kind == "video":
        found = sorted({*found, *(path.parent for path in files if _ends(path, IMAGE_SUFFIXES))})
    if not found:
        raise FileNotFoundError(f"{folder}: no {kind} in it ({', '.join(sorted(SUFFIXES[kind]))})")
    return Found(kind, tuple(found[index] for index in spread(len(found), limit)), len(found))


def spread(total: int, limit: int | None) -> list[int]:
    """At most `limit` of 0..total-1, evenly spaced: the first of a sorted set would be all of its first class.

    Raises ValueError for a limit under 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit}; wanted 1 or more")
    count = total if limit is None else min(limit, total)
    return [index * total // count for index in range(count)]


def read_image(path: Path, protocol: Protocol) -> UInt8Array:
    """A picture as the model sees it, uint8 [H, W, 3]; cut-outs are put on white. Raises ValueError."""
    return _fitted([read_pixels(path)], path, protocol)[0]


def spread_frames(path: Path, count: int) -> list[UInt8Array]:
    """So many frames of a clip, or all of a shorter one, from the middles of equal parts. Raises ValueError."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _ends(file, IMAGE_SUFFIXES))
        return [read_pixels(files[index]) for index in _middles(len(files), count)]
    try:
        # Twice through the file: what its header says of its length need not be true, and not all of it may fit.
        with path.open("rb") as file, iter_video(file, LIMITS) as reader:
            wanted = set(_middles(sum(1 for _ in reader), count))
        with path.open("rb") as file, iter_video(file, LIMITS) as reader:
            return [frame for index, frame in enumerate(reader) if index in wanted]
    except MediaError as error:
        raise ValueError(f"{path}: {error.detail}") from None


def read_clip(path: Path, protocol: Protocol) -> UInt8Array:
    """A clip as the model sees it, uint8 [T, H, W, 3], from a file or a folder of frames. Raises ValueError."""
    if path.is_dir():
        frames = sorted(file for file in path.iterdir() if _ends(file, IMAGE_SUFFIXES))
        return _fitted((read_pixels(file) for file in frames[: protocol.frames]), path, protocol)
    try:
        with path.open("rb") as file, iter_video(file, LIMITS) as reader:
            return _fitted(islice(reader, protocol.frames), path, protocol)
    except MediaError as error:
        raise ValueError(f"{path}: {error.detail}") from None


def read_pixels(path: Path) -> UInt8Array:
    """A picture at its own size, uint8 [H, W, 3]; cut-outs are put on white. Raises ValueError."""
    try:
        return np.asarray(flatten(read_picture(path)))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _middles(total: int, count: int) -> list[int]:
    """The middles of `count` equal parts of 0..total-1."""
    count = min(count, total)
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]


def _fitted(frames: Iterator[UInt8Array] | Sequence[UInt8Array], path: Path, protocol: Protocol) -> UInt8Array:
    # One by one: a clip at its own size may be much larger than at that of the protocol.
    fitted = [protocol.fit(frame[None])[0] for frame in frames]
    sizes = {frame.shape[:2] for frame in fitted}
    if len(sizes) != 1 or min(min(size) for size in sizes) < SMALLEST:
        given = " and ".join(f"{height} x {width}" for height, width in sorted(sizes)) or "nothing"
        raise ValueError(f"{path}: {given} pixels at the size of {protocol.name}; wanted one size, {SMALLEST} or more")
    return np.stack(fitted)


def _ends(path: Path, suffixes: set[str]) -> bool:
    return path.suffix.lower() in suffixes
