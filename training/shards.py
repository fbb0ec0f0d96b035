"""Shards in the WebDataset form, as they lie in a folder or behind an address: written, listed and counted.

Beside them index.json says how many samples each holds, so that sample n can be found without reading those before.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Self

from training.shard_file import UNREACHABLE, OpenShard, Record, fetch, is_remote

INDEX = "index.json"


@dataclass(frozen=True)
class Shard:
    """place: path or http(s) address. count: of its samples."""

    place: str
    count: int

    @property
    def name(self) -> str:
        """The last part of its place."""
        return self.place.rsplit("/", 1)[-1]


class ShardWriter:
    """Writes NAME-000000.tar, NAME-000001.tar ... of at most `bytes_each`, and at the end the index.

    A shard appears under its name when it is whole. Equal samples give equal files. Raises ValueError where there are
    such shards already: those that are not written again would stay and be read with the new ones.
    """

    def __init__(self, folder: Path, name: str, bytes_each: int = 256 * 1024 * 1024) -> None:
        if any(folder.glob(f"{name}-[0-9]*.tar")):
            raise ValueError(f"{folder} has shards {name}-*.tar already: remove them or choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.name = name
        self.bytes_each = bytes_each
        self.counts: dict[str, int] = {}
        self._tar: tarfile.TarFile | None = None
        self._written = self._samples = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None:
            self._tar.close()
            self._partial().unlink()

    def write(self, record: Record) -> None:
        """Add a sample. Raises ValueError for a key with a dot or slash, which would be split elsewhere."""
        if not re.fullmatch(r"[^./\\]+", record.key):
            raise ValueError(f"key {record.key!r}; wanted a name without dots and slashes")
        size = len(record.media) + len(record.caption)
        if self._tar is not None and self._written + size > self.bytes_each:
            self._finish()
        if self._tar is None:
            self._tar = tarfile.open(self._partial(), "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115  # closed later
        _add(self._tar, f"{record.key}.{record.suffix}", record.media)
        if record.caption:
            _add(self._tar, f"{record.key}.txt", record.caption.encode())
        self._written += size
        self._samples += 1

    def close(self) -> None:
        """Finish the last shard and write the index, which keeps what other writers put there."""
        self._finish()
        write_index(self.folder, {**_index_of(self.folder), **self.counts})

    def _partial(self) -> Path:
        return self.folder / f"{self.name}-{len(self.counts):06d}.tar.partial"

    def _finish(self) -> None:
        if self._tar is None:
            return
        partial = self._partial()
        self._tar.close()
        path = partial.with_suffix("")
        partial.rename(path)
        self.counts[path.name] = self._samples
        self._tar, self._written, self._samples = None, 0, 0


def write_index(folder: Path, counts: dict[str, int]) -> None:
    """Write index.json of a folder: the samples of each shard, by its file name."""
    partial = folder / f"{INDEX}.partial"
    partial.write_text(json.dumps(dict(sorted(counts.items())), indent=1) + "\n")
    partial.rename(folder / INDEX)


def count_shards(folder: Path, log: Callable[[str], None]) -> int:
    """Write the index of shards that came without one; returns their samples. Raises FileNotFoundError for none."""
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*.tar")):
        shard = OpenShard(str(path))
        counts[path.name] = len(shard)
        if shard.problem:
            log(shard.problem)
    if not counts:
        raise FileNotFoundError(f"{folder}: no shards in this folder")
    write_index(folder, counts)
    return sum(counts.values())


def expand(pattern: str) -> list[str]:
    """`images-{000000..000012}.tar` as its places, one range at most; a pattern without braces is itself."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    return [
        pattern[: found.start()] + f"{number:0{len(first)}d}" + pattern[found.end() :]
        for number in range(int(first), int(last) + 1)
    ]


def open_shards(patterns: Sequence[str]) -> list[Shard]:
    """Shards of patterns: a folder (all of its *.tar), a file, an http(s) address, with {000..012} or `*.tar`.

    Counts come from index.json beside them; local shards without one are counted. Raises FileNotFoundError for what is
    not there, ValueError for a remote shard without index, and for a shard that is counted and cannot be read to its
    end: what it lost could not be held against the share that may be lost.
    """
    indices: dict[str, dict[str, int]] = {}
    shards = [
        shard
        for pattern in patterns
        for place in expand(pattern)
        for shard in (_remote(place, indices) if is_remote(place) else _local(Path(place), indices))
    ]
    if not shards:
        raise FileNotFoundError(f"no shards in {', '.join(patterns)}; `python -m training.prepare` makes them")
    return shards


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(data))


def _index_of(folder: Path) -> dict[str, int]:
    path = folder / INDEX
    return _counts(str(path), path.read_bytes()) if path.is_file() else {}


def _local(path: Path, indices: dict[str, dict[str, int]]) -> Iterator[Shard]:
    paths: Iterable[Path] = [path]
    if "*" in path.name:
        paths = sorted(path.parent.glob(path.name))
    elif path.is_dir():
        paths = sorted(path.glob("*.tar"))
    for found in paths:
        if not found.is_file():
            raise FileNotFoundError(f"{found}: no such shard")
        folder = str(found.parent)
        if folder not in indices:
            indices[folder] = _index_of(found.parent)
        count = indices[folder].get(found.name)
        if count is None:
            shard = OpenShard(str(found))
            count = len(shard)
            if shard.problem:
                index = f"`python -m training.prepare {folder} --index` counts them"
                rest = f"; its {count} whole samples can be used: {index}" if count else ""
                raise ValueError(shard.problem + rest)
        yield Shard(str(found), count)


def _remote(place: str, indices: dict[str, dict[str, int]]) -> Iterator[Shard]:
    folder, _, name = place.rpartition("/")
    index = f"{folder}/{INDEX}"
    if folder not in indices:
        file = io.BytesIO()
        try:
            fetch(index, file, Event(), (1.0, 2.0))
        except UNREACHABLE as error:
            raise ValueError(f"{index}: {error}; remote shards need the index that training.prepare writes") from None
        indices[folder] = _counts(index, file.getvalue())
    if name not in indices[folder]:
        raise FileNotFoundError(f"{place} is not in {index}")
    yield Shard(place, indices[folder][name])


def _counts(place: str, data: bytes) -> dict[str, int]:
    """The index in a file. Raises ValueError for what is no JSON; another program's index.json says nothing."""
    try:
        values = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if not isinstance(values, dict):
        return {}
    return {name: count for name, count in values.items() if isinstance(count, int) and count >= 0}
