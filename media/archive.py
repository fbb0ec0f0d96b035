"""A zip file from a stranger: what is in it, and its files by name, within bounds."""

from __future__ import annotations

import io
import re
import stat
import zipfile
import zlib

from media.errors import MediaError
from media.limits import Limits

_IGNORED = re.compile(r"(^|/)(__MACOSX/|\.DS_Store$|\._)")
_DRIVE = re.compile(r"^[A-Za-z]:")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1


class Archive:
    """names: its files in order, as plain relative paths. What is unpacked counts against one bound for all."""

    def __init__(self, data: bytes, limits: Limits) -> None:
        if len(data) > limits.archive_bytes:
            raise MediaError(
                "item_too_large",
                f"the zip file has {len(data)} bytes; at most {limits.archive_bytes} are allowed",
                limit=limits.archive_bytes,
                actual=len(data),
            )
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
            members = self._zip.infolist()
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, UnicodeDecodeError, EOFError):
            raise MediaError("corrupt_media", "the zip file is damaged or cut short") from None
        if len(members) > limits.archive_members:
            raise MediaError(
                "item_too_large",
                f"the zip file has {len(members)} members; at most {limits.archive_members} are allowed",
                limit=limits.archive_members,
                actual=len(members),
            )
        self._left = self._bound = limits.archive_unpacked_bytes
        self._files: dict[str, zipfile.ZipInfo] = {}
        for member in members:
            _check_name(member)
            if member.is_dir() or _IGNORED.search(member.filename):
                continue
            _check_kind(member)
            if member.filename in self._files:
                raise MediaError("corrupt_media", f"the zip file has two members named {_shown(member.filename)}")
            self._files[member.filename] = member
        total = sum(member.file_size for member in self._files.values())
        if total > self._bound:
            raise self._too_large(total)

    @property
    def names(self) -> tuple[str, ...]:
        """Paths with forward slashes, none absolute, none with `..`."""
        return tuple(self._files)

    def read(self, name: str, most: int | None = None) -> bytes:
        """Unpack one file. most: bytes that it may have; all reads together have a bound of their own.

        Raises MediaError: corrupt_media, item_too_large.
        """
        member = self._files.get(name)
        if member is None:
            raise MediaError("corrupt_media", f"the zip file has no member {_shown(name)}")
        try:
            room = self._left if most is None else min(most, self._left)
            with self._zip.open(member) as source:
                # Headers lie: what counts is what comes out.
                data = source.read(room + 1)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError, NotImplementedError):
            raise MediaError("corrupt_media", f"the member {_shown(name)} of the zip file is damaged") from None
        if len(data) > room:
            if room == self._left:
                raise self._too_large(self._bound + 1)
            raise MediaError(
                "item_too_large",
                f"the member {_shown(name)} of the zip file unpacks to more than {room} bytes",
                limit=room,
                actual=max(member.file_size, room + 1),
            )
        self._left -= len(data)
        return data

    def _too_large(self, size: int) -> MediaError:
        return MediaError(
            "item_too_large",
            f"the zip file unpacks to {size} bytes or more; at most {self._bound} are allowed",
            limit=self._bound,
            actual=size,
        )


def open_archive(data: bytes, limits: Limits) -> Archive:
    """Read the directory of a zip file; nothing is unpacked yet. Raises MediaError."""
    return Archive(data, limits)


def _check_name(member: zipfile.ZipInfo) -> None:
    # zipfile cuts names at a NUL and turns the machine's separators round; orig_filename is what stands there.
    name = member.orig_filename
    if (
        not name.strip("/")
        or name.startswith("/")
        or "\\" in name
        or _DRIVE.match(name)
        or not name.isprintable()
        or any(step in ("..", ".") for step in name.split("/"))
    ):
        raise MediaError(
            "corrupt_media", f"the zip file has a member named {_shown(name)}; only plain relative paths are taken"
        )


def _check_kind(member: zipfile.ZipInfo) -> None:
    what = None
    mode = member.external_attr >> 16
    if mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode):
        what = "a link or special file"
    elif member.flag_bits & _ENCRYPTED:
        what = "encrypted"
    elif member.compress_type not in _METHODS:
        what = f"packed by method {member.compress_type}; only stored and deflated ones are taken"
    if what:
        raise MediaError("corrupt_media", f"the member {_shown(member.filename)} of the zip file is {what}")


def _shown(name: str) -> str:
    kept = "".join(character if character.isprintable() else "?" for character in name[:80])
    return repr(kept)
