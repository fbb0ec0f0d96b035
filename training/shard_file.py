"""One shard, open for reading anywhere: a tar file in which members with one stem are a sample (`00012.jpg`, `.txt`).

A remote shard is fetched whole into a file without a name. No sample is in memory until it is asked for.
"""

from __future__ import annotations

import json
import os
import tarfile
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event
from typing import BinaryIO, NamedTuple

import httpx

MEDIA = (
    *("glb", "gltf", "obj", "ply", "stl", "off"),
    *("mp4", "m4v", "mov", "mkv", "webm", "avi"),
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "gif"),
    # Last, because next to a picture they are features or masks.
    *("safetensors", "npz", "zip"),
)
"""Suffixes of what can be decoded; of several members of a sample the first of these is taken, as a clip before its
preview."""

TIMEOUT_S = 60.0
"""Longest silence of a server."""

WAITS_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0)
"""Pauses between tries of a shard: a server that is started anew costs a run a minute, not its data."""

UNREACHABLE = (OSError, httpx.HTTPError, httpx.InvalidURL)

Span = tuple[int, int]
"""Offset and size in the file."""


@dataclass(frozen=True)
class Record:
    """A sample as stored. key: its stem; suffix: of its media file, lower case; caption: "" if there is none."""

    key: str
    suffix: str
    media: bytes
    caption: str


class _Entry(NamedTuple):
    key: str
    suffix: str
    media: Span
    text: Span | None
    json: Span | None


class OpenShard:
    """A shard that any thread may read at any place; closed when nobody holds it any more.

    problem: why it cannot be read to its end, or at all; the samples that are whole before that can be used.
    stopped: ends a fetch that goes on.
    """

    def __init__(self, place: str, stopped: Event | None = None) -> None:
        self.problem: str | None = None
        self._entries: list[_Entry] = []
        try:
            self._number = _opened(place, stopped or Event())
            # Not closed by hand: a thread may be reading when the shard is put away, and numbers are given out again.
            weakref.finalize(self, os.close, self._number)
            with open(self._number, "rb", closefd=False) as file:
                parts, problem = _members(file)
        except UNREACHABLE as error:
            self.problem = f"{place}: {error or type(error).__name__}"
            return
        self._entries = [entry for key, spans in parts.items() for entry in _entry(key, spans)]
        if not problem and parts and not self._entries:
            suffixes = sorted({suffix for spans in parts.values() for suffix in spans})
            problem = f"no media among its files, which are {', '.join(suffixes[:8])}; wanted {', '.join(MEDIA)}"
        self.problem = problem and f"{place}: {problem}"

    def __len__(self) -> int:
        return len(self._entries)

    def record(self, index: int) -> Record:
        """Raises OSError where the file no longer holds what it held when it was opened."""
        entry = self._entries[index]
        caption = self._read(entry.text).decode("utf-8-sig", "replace").strip() if entry.text else ""
        if not caption and entry.json:
            try:
                caption = caption_of(json.loads(self._read(entry.json)))
            except (ValueError, RecursionError):
                caption = ""
        return Record(entry.key, entry.suffix, self._read(entry.media), caption)

    def _read(self, span: Span) -> bytes:
        offset, size = span
        data = os.pread(self._number, size, offset)
        if len(data) != size:
            raise OSError(f"the shard ends after {len(data)} of {size} bytes of a file: it was changed")
        return data


def read_shard(place: str) -> tuple[list[Record], str | None]:
    """All samples of a shard, in order, and what is wrong with it if it cannot be read to its end."""
    shard = OpenShard(place)
    return [shard.record(index) for index in range(len(shard))], shard.problem


def caption_of(value: object, names: Sequence[str] = ("caption", "text")) -> str:
    """The caption in a JSON value as data sets keep it: a text, a list of texts, an object with one of `names`."""
    if isinstance(value, dict):
        value = next((value[name] for name in names if value.get(name)), "")
    if isinstance(value, list):
        value = next((text for text in value if isinstance(text, str) and text.strip()), "")
    # JSON can hold half characters ("\ud800"), at which tokenizers and files fail.
    return value.encode("utf-8", "replace").decode().strip() if isinstance(value, str) else ""


def is_remote(place: str) -> bool:
    """Whether a place is an address."""
    return place.startswith(("http://", "https://"))


def fetch(address: str, file: BinaryIO, stopped: Event, waits_s: Sequence[float]) -> None:
    """Fill a file with what is at an address; what may pass (no answer, a cut, 5xx) is tried again after a pause.

    Raises httpx.HTTPError, or OSError once `stopped` is set.
    """
    for wait_s in (*waits_s, None):
        file.seek(0)
        file.truncate()
        try:
            with httpx.stream("GET", address, timeout=TIMEOUT_S, follow_redirects=True) as answer:
                answer.raise_for_status()
                for part in answer.iter_bytes():
                    if stopped.is_set():
                        raise InterruptedError("stopped while it was fetched")
                    file.write(part)
            file.flush()
            return
        except httpx.HTTPError as error:
            status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 0
            for_good = 400 <= status < 500 and status not in (408, 425, 429)
            if wait_s is None or for_good or stopped.wait(wait_s):
                raise


def _opened(place: str, stopped: Event) -> int:
    """The number of an open file, at its start."""
    if not is_remote(place):
        return os.open(place, os.O_RDONLY)
    number, path = tempfile.mkstemp(prefix="atoken-shard-")
    os.unlink(path)
    try:
        with open(number, "r+b", closefd=False) as file:
            fetch(place, file, stopped, WAITS_S)
            file.seek(0)
    except BaseException:
        os.close(number)
        raise
    return number


def _members(file: BinaryIO) -> tuple[dict[str, dict[str, Span]], str | None]:
    """Where the files of each sample are, by suffix, and what is wrong; of a file with two entries the last counts."""
    parts: dict[str, dict[str, Span]] = {}
    last = ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                key, suffix = _split(member.name)
                if member.isreg() and not member.issparse() and key and suffix:
                    parts.setdefault(key, {})[suffix] = (member.offset_data, member.size)
                    last = key
            # tarfile takes a file that ends between two members, and a damaged header, for the end.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no member and no end mark at byte {tar.offset}: it was cut or damaged")
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        parts.pop(last, None)  # some of its files may be missing
        return parts, str(error) or type(error).__name__
    return parts, None


def _entry(key: str, spans: dict[str, Span]) -> list[_Entry]:
    """A sample, if one of its files can be media: `jpg` before `mask.png`."""
    known = [suffix for suffix in spans if suffix.rpartition(".")[2] in MEDIA]
    if not known:
        return []
    suffix = min(known, key=lambda suffix: (suffix.count("."), MEDIA.index(suffix.rpartition(".")[2])))
    return [_Entry(key, suffix.rpartition(".")[2], spans[suffix], spans.get("txt"), spans.get("json"))]


def _split(name: str) -> tuple[str, str]:
    """Stem with folders, and all that follows the first dot of the file name, lower case; no stem of hidden files."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}{slash}{stem}" if stem else "", suffix.lower()
