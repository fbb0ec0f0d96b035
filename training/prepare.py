"""Folders to shards: `python -m training.prepare OUT --images DIR --videos DIR --meshes DIR`.

Pictures and clips are stored as they are, once they were decoded to see that they can be; meshes are drawn and
voxelised. A caption is in NAME.txt beside the file or in a JSON of paths and texts. With --index: shards that others
made get their index.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from pebble import ProcessExpired, ProcessPool

from media.decode import decode_media
from media.errors import MediaError
from media.limits import GIB, MIB
from media.sniff import probe
from media.types import Asset
from media.video import iter_video
from training.samples import LIMITS, PATCH_FRAMES, voxels_bytes
from training.shard_file import Record, caption_of
from training.shards import ShardWriter, count_shards

MOST_BYTES = GIB
"""Of a file; samples are in memory whole."""

PATIENCE_S = 600.0
"""What looking at one file may take."""

AHEAD = 4
"""Files that wait for each worker. Results are media files: more would fill the memory while one of them is slow."""

SUFFIXES = {"jpeg": "jpg", "matroska": "mkv"}
NOT_MEDIA = {".txt", ".json", ".csv", ".md"}


@dataclass
class Report:
    """What became of a folder."""

    modality: str
    samples: int = 0
    captions: int = 0
    bytes: int = 0
    bad: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        bad = ", ".join(f"{count} {reason}" for reason, count in self.bad.most_common()) or "none"
        return (
            f"{self.modality}: {self.samples} samples, {self.captions} with captions, {self.bytes / MIB:.1f} MiB; "
            f"left out: {bad}"
        )


def prepare(
    out: Path,
    modality: str,
    folder: Path,
    paths: Sequence[Path],
    captions: Mapping[str, str],
    *,
    bytes_each: int,
    workers: int,
    log: Callable[[str], None],
) -> Report:
    """Write the files of a folder as shards MODALITY-*.tar. Raises ValueError where none of them can be used."""
    report = Report(modality)
    with ShardWriter(out, modality, bytes_each) as writer:
        for path, result in _checked(paths, modality, workers):
            name = path.relative_to(folder).as_posix()
            if isinstance(result, str):
                reason, _, detail = result.partition(": ")
                report.bad[reason] += 1
                log(f"{name} is left out: {detail}")
                continue
            suffix, media = result
            caption = _listed(captions, path) or _beside(path)
            writer.write(Record(key_of(name), suffix, media, caption))
            report.samples += 1
            report.captions += bool(caption)
            report.bytes += len(media)
        if not report.samples:
            raise ValueError(f"{folder}: none of its {len(paths)} files can be used")
    return report


def files_of(folder: Path) -> list[Path]:
    """What may be media, with subfolders. Raises FileNotFoundError for nothing."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() not in NOT_MEDIA and not path.name.startswith(".") and path.is_file()
    )
    if not paths:
        raise FileNotFoundError(f"{folder}: no files in this folder")
    return paths


def key_of(name: str) -> str:
    """A key without dots and slashes that two files of a folder never share."""
    stem = "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in Path(name).stem)
    return f"{stem[:40]}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def read_captions(path: Path | None) -> dict[str, str]:
    """Ends of paths to texts: {"birds/a.jpg": "A toucan."}, or objects with "caption", "text" or "name".

    Raises ValueError for other files.
    """
    if path is None:
        return {}
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no JSON object of paths and texts")
    names = ("caption", "text", "name")
    return {name: text for name, value in values.items() if (text := caption_of(value, names))}


def _listed(captions: Mapping[str, str], path: Path) -> str:
    """The text of the longest end of a path that is listed, so that paths below any folder above it will do."""
    parts = path.absolute().parts
    ends = ("/".join(parts[start:]) for start in range(1, len(parts)))
    return next((captions[end] for end in ends if end in captions), "")


def _beside(path: Path) -> str:
    note = path.with_suffix(".txt")
    return note.read_bytes().decode("utf-8-sig", "replace").strip() if note.is_file() else ""


def _checked(paths: Sequence[Path], modality: str, workers: int) -> Iterator[tuple[Path, tuple[str, bytes] | str]]:
    """Each file and its suffix and bytes, or why not, in order. A file that kills its worker costs itself only."""
    with ProcessPool(workers) as pool:
        waiting: deque[tuple[Path, Future[tuple[str, bytes] | str]]] = deque()
        for path in paths:
            waiting.append((path, pool.schedule(_check, args=[modality, path], timeout=PATIENCE_S)))
            if len(waiting) > AHEAD * workers:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())


def _result(path: Path, future: Future[tuple[str, bytes] | str]) -> tuple[Path, tuple[str, bytes] | str]:
    try:
        return path, future.result()
    except ProcessExpired:
        return path, "crash: the process that looked at it died"
    except TimeoutError:
        return path, f"timeout: looking at it took more than {PATIENCE_S:.0f} s"


def _check(modality: str, path: Path) -> tuple[str, bytes] | str:
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            return f"item_too_large: {size} bytes; at most {MOST_BYTES} of a file"
        data = path.read_bytes()
        if modality == "videos":
            with iter_video(data, LIMITS) as reader:  # one by one: a minute of 1080p is 10 GB
                frames = sum(1 for _ in reader)
            if frames < PATCH_FRAMES:
                return f"too_short: {frames} frames; wanted {PATCH_FRAMES} or more"
        else:
            item = decode_media(data, LIMITS, {"images": "image", "assets": "asset"}[modality])
            if isinstance(item, Asset):
                return "safetensors", voxels_bytes(item.voxels)
        # By its content: readers of shards go by the suffix, and files have other ones, or none.
        format_name = probe(data, LIMITS).format
    except MediaError as error:
        return f"{error.code}: {error.detail}"
    except OSError as error:
        return f"unreadable: {error}"
    return SUFFIXES.get(format_name, format_name), data


def main(arguments: Sequence[str] | None = None) -> int:
    """Write shards; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.prepare", description="Folders to WebDataset shards.")
    parser.add_argument("out", type=Path, help="folder of the shards; index.json goes there too")
    for modality in ("images", "videos", "meshes"):
        parser.add_argument(
            f"--{modality}", type=Path, metavar="DIR", help=f"folder of {modality}, with its subfolders"
        )
        parser.add_argument(f"--{modality}-captions", type=Path, metavar="FILE", help="JSON of paths and texts")
    parser.add_argument(
        "--index", action="store_true", help="count the shards that are in OUT and write its index.json"
    )
    parser.add_argument("--shard-mb", type=int, default=256, help="most MiB of a shard")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args(arguments)
    if not (given.images or given.videos or given.meshes or given.index):
        parser.error("nothing to prepare: give --images, --videos or --meshes, or --index")
    try:
        # All is looked up before the first is written: hours of work are not for a slip in the last word.
        work = [
            (modality, folder, files_of(folder), read_captions(getattr(given, f"{name}_captions")))
            for name, modality in (("images", "images"), ("videos", "videos"), ("meshes", "assets"))
            if (folder := getattr(given, name)) is not None
        ]
        for modality, folder, paths, captions in work:
            report = prepare(
                given.out,
                modality,
                folder,
                paths,
                captions,
                bytes_each=given.shard_mb * MIB,
                workers=given.workers,
                log=print,
            )
            print(report)
        if given.index:
            print(f"{given.out / 'index.json'}: {count_shards(given.out, print)} samples")
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
