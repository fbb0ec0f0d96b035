"""Folders to shards: `python -m training.prepare OUT --images DIR --videos DIR --meshes DIR`.

Pictures and clips are stored as they are, once they were decoded to see that they can be; meshes are drawn and
voxelised. A caption is in NAME.txt beside the file or in a JSON of paths and texts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from media.decode import decode_media
from media.errors import MediaError
from media.limits import Limits
from media.types import Asset
from training.samples import voxels_bytes
from training.shards import Record, ShardWriter

LIMITS = Limits.local()
MIB = 1024 * 1024
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
    captions: Mapping[str, str],
    *,
    bytes_each: int,
    workers: int,
    log: Callable[[str], None],
) -> Report:
    """Write one folder as shards MODALITY-*.tar. Raises FileNotFoundError where it has no files."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() not in NOT_MEDIA)
    if not paths:
        raise FileNotFoundError(f"{folder}: no files in this folder")
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
    return report


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
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no JSON object of paths and texts")
    return {name: text for name, value in values.items() if (text := _text(value))}


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return str(value.get("caption") or value.get("text") or value.get("name") or "")
    return ""


def _listed(captions: Mapping[str, str], path: Path) -> str:
    """The text of the longest end of a path that is listed, so that paths below any folder above it will do."""
    parts = path.absolute().parts
    ends = ("/".join(parts[start:]) for start in range(1, len(parts)))
    return next((captions[end] for end in ends if end in captions), "")


def _beside(path: Path) -> str:
    note = path.with_suffix(".txt")
    return note.read_text(errors="replace").strip() if note.is_file() else ""


def _checked(paths: Sequence[Path], modality: str, workers: int) -> Iterator[tuple[Path, tuple[str, bytes] | str]]:
    """Each file and its suffix and bytes, or why not, in order."""
    with ProcessPoolExecutor(workers) as pool:
        yield from zip(paths, pool.map(partial(_check, modality), paths, chunksize=4), strict=True)


def _check(modality: str, path: Path) -> tuple[str, bytes] | str:
    try:
        data = path.read_bytes()
        item = decode_media(data, LIMITS, {"images": "image", "videos": "video", "assets": "asset"}[modality])
    except MediaError as error:
        return f"{error.code}: {error.detail}"
    except OSError as error:
        return f"unreadable: {error}"
    if isinstance(item, Asset):
        return "safetensors", voxels_bytes(item.voxels)
    return path.suffix.lower().removeprefix("."), data


def main(arguments: Sequence[str] | None = None) -> int:
    """Write shards; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.prepare", description="Folders to WebDataset shards.")
    parser.add_argument("out", type=Path, help="folder of the shards; index.json goes there too")
    for modality in ("images", "videos", "meshes"):
        parser.add_argument(
            f"--{modality}", type=Path, metavar="DIR", help=f"folder of {modality}, with its subfolders"
        )
        parser.add_argument(f"--{modality}-captions", type=Path, metavar="FILE", help="JSON of paths and texts")
    parser.add_argument("--shard-mb", type=int, default=256, help="most MiB of a shard")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args(arguments)
    if not (given.images or given.videos or given.meshes):
        parser.error("nothing to prepare: give --images, --videos or --meshes")
    try:
        for name, modality in (("images", "images"), ("videos", "videos"), ("meshes", "assets")):
            folder: Path | None = getattr(given, name)
            if folder is not None:
                report = prepare(
                    given.out,
                    modality,
                    folder,
                    read_captions(getattr(given, f"{name}_captions")),
                    bytes_each=given.shard_mb * MIB,
                    workers=given.workers,
                    log=print,
                )
                print(report)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
