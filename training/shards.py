"""Shards in the WebDataset form: tar files in which members with one stem are a sample (`00012.jpg`, `00012.txt`).

Beside them index.json says how many samples each holds, so that sample n can be found without reading those before.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

INDEX = "index.json"
CAPTION = "txt"
TIMEOUT_S = 60.0
TRIES = 3


@dataclass(frozen=True)
class Record:
    """A sample as stored. key: its stem; suffix: of its media file, lower case; caption: "" if there is none."""

    key: str
    suffix: str
    media: bytes
    caption: str


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

    A shard appears under its name when it is whole. Equal samples give equal files.
    """

    def __init__(self, folder: Path, name: str, bytes_each: int = 256 * 1024 * 1024) -> None:
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
            _add(self._tar, f"{record.key}.{CAPTION}", record.caption.encode())
        self._written += size
        self._samples += 1

    def close(self) -> None:
        """Finish the last shard and write the index, which keeps what other writers put there."""
        self._finish()
        path = self.folder / INDEX
        known: dict[str, int] = json.loads(path.read_text()) if path.is_file() else {}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(dict(sorted({**known, **self.counts}.items())), indent=1) + "\n")
        partial.rename(path)

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
    """Shards of patterns: a folder (all of its index), a file, an http(s) address, with {000..012} or `*.tar`.

    Counts come from index.json beside them; local shards without one are counted. Raises FileNotFoundError for what is
    not there, ValueError for a remote shard without index.
    """
    shards: list[Shard] = []
    for pattern in patterns:
        for place in expand(pattern):
            shards += _remote(place) if _is_remote(place) else _local(Path(place))
    if not shards:
        raise FileNotFoundError(f"no shards in {', '.join(patterns)}; `python -m training.prepare` makes them")
    return shards


def read_shard(place: str) -> tuple[list[Record], str | None]:
    """All samples of a shard, in order, and what is wrong with it if it cannot be read to its end.

    A sample whose members are cut is left out.
    """
    try:
        data = _fetch(place) if _is_remote(place) else Path(place).read_bytes()
    except (OSError, httpx.HTTPError) as error:
        return [], f"{place}: {error or type(error).__name__}"
    records: list[Record] = []
    pending: dict[str, tuple[str, bytes]] = {}
    key = ""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                stem, suffix = _split(member.name)
                if not member.isfile() or not suffix:
                    continue
                if stem != key:
                    records += _record(key, pending)
                    key, pending = stem, {}
                content = tar.extractfile(member)
                assert content is not None
                body = content.read()
                if len(body) != member.size:
                    raise tarfile.ReadError(f"{member.name} ends after {len(body)} of {member.size} bytes")
                pending[suffix] = (suffix, body)
            # tarfile takes a file that ends between two members for whole: the end is two blocks of zeros.
            if not data.endswith(bytes(2 * tarfile.BLOCKSIZE)):
                raise tarfile.ReadError("it has no end mark")
        records += _record(key, pending)
    except (tarfile.TarError, EOFError) as error:
        return records, f"{place}: {error}"
    return records, None


def _record(key: str, parts: dict[str, tuple[str, bytes]]) -> list[Record]:
    caption = parts.get(CAPTION)
    media = [part for suffix, part in parts.items() if suffix not in (CAPTION, "json")]
    text = caption[1].decode("utf-8", "replace").strip() if caption else ""
    if not text and "json" in parts:
        text = _caption_of(parts["json"][1])
    return [Record(key, media[0][0], media[0][1], text)] if media else []


def _caption_of(data: bytes) -> str:
    """The caption in a sample's JSON, as public data sets keep it."""
    try:
        values = json.loads(data)
    except ValueError:
        return ""
    return str(values.get("caption") or values.get("text") or "") if isinstance(values, dict) else ""


def _split(name: str) -> tuple[str, str]:
    """Stem with folders, and all that follows the first dot of the file name, lower case."""
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}/{stem}", suffix.lower()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(data))


def _is_remote(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def _local(path: Path) -> Iterator[Shard]:
    if "*" in path.name:
        paths = sorted(path.parent.glob(path.name))
    elif path.is_dir():
        paths = sorted(path.glob("*.tar"))
    else:
        paths = [path]
    for found in paths:
        if not found.is_file():
            raise FileNotFoundError(f"{found}: no such shard")
        index = found.parent / INDEX
        known: dict[str, int] = json.loads(index.read_text()) if index.is_file() else {}
        count = known[found.name] if found.name in known else len(read_shard(str(found))[0])
        yield Shard(str(found), count)


def _remote(place: str) -> Iterator[Shard]:
    folder, _, name = place.rpartition("/")
    try:
        known: dict[str, int] = json.loads(_fetch(f"{folder}/{INDEX}"))
    except (httpx.HTTPError, ValueError) as error:
        raise ValueError(
            f"{folder}/{INDEX}: {error}; remote shards need the index that training.prepare writes"
        ) from None
    if name not in known:
        raise FileNotFoundError(f"{place} is not in {folder}/{INDEX}")
    yield Shard(place, known[name])


def _fetch(address: str) -> bytes:
    for attempt in range(TRIES):
        try:
            answer = httpx.get(address, timeout=TIMEOUT_S, follow_redirects=True)
            answer.raise_for_status()
        except httpx.HTTPStatusError as error:
            if error.response.status_code < 500 or attempt == TRIES - 1:
                raise
        except httpx.TransportError:
            if attempt == TRIES - 1:
                raise
        else:
            return answer.content
    raise AssertionError("unreachable")
