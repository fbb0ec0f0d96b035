"""What the header parsers share: the record they return and the bound on their work."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from media.errors import MediaError
from media.orientation import swaps_sides

# A real 20 MiB GIF has 82,000 sub-blocks and a 2000-frame clip a few thousand boxes; this many steps take 0.1 s.
MIN_STEPS = 200_000
# Only a person's own long films (Limits.local) are large enough for this to be more.
BYTES_PER_STEP = 512


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says about itself. width, height: as stored, before orientation (EXIF number, 1..8) is applied.

    frames: as announced, None if the header does not say. codec: of a video container, None for images.
    """

    format: str
    width: int
    height: int
    orientation: int = 1
    frames: int | None = 1
    seconds: float | None = None
    codec: str | None = None

    @property
    def upright_size(self) -> tuple[int, int]:
        """(height, width) of the upright picture."""
        if swaps_sides(self.orientation):
            return self.width, self.height
        return self.height, self.width


class Steps:
    """Counts the parts of a file that a parser walks over, so that a file made of tiny parts cannot stall it."""

    def __init__(self, what: str, size: int) -> None:
        self.what = what
        self.limit = max(MIN_STEPS, size // BYTES_PER_STEP)
        self.left = self.limit

    def take(self) -> None:
        """Raise MediaError when there were too many."""
        self.left -= 1
        if self.left < 0:
            raise MediaError("corrupt_media", f"the {self.what} file has too many parts", limit=self.limit)


def unpack(layout: str, data: bytes, at: int) -> tuple[int, ...]:
    """struct.unpack_from that answers with MediaError where the file ends too early."""
    try:
        return struct.unpack_from(layout, data, at)
    except struct.error:
        raise MediaError("corrupt_media", "the file is cut short inside its header") from None


def cut_short(what: str) -> MediaError:
    """The error for a file whose parts announce more bytes than there are."""
    return MediaError("corrupt_media", f"the {what} file is cut short")


def printable(code: bytes) -> str:
    """A codec or format code from a file, safe to show."""
    return "".join(chr(c) if chr(c).isalnum() or c in b"._-/" else "?" for c in code[:32] if c < 128).strip() or "?"
