"""The eight ways in which a stored picture can lie, numbered as in EXIF, and how to set it upright."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np

from media.types import UInt8Array

# EXIF orientation -> (transpose first, then mirror columns, then mirror rows).
_STEPS: Final = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
_NUMBER: Final = {steps: number for number, steps in _STEPS.items()}


def upright(pixels: UInt8Array, orientation: int) -> UInt8Array:
    """Set pixels [..., H, W, 3] upright; returns a contiguous array. orientation: 1..8."""
    transpose, mirror_columns, mirror_rows = _STEPS[orientation]
    if transpose:
        pixels = pixels.swapaxes(-3, -2)
    if mirror_columns:
        pixels = pixels[..., ::-1, :]
    if mirror_rows:
        pixels = pixels[..., ::-1, :, :]
    return np.ascontiguousarray(pixels)


def swaps_sides(orientation: int) -> bool:
    """Whether the upright picture's width is the stored picture's height."""
    return _STEPS[orientation][0]


def from_matrix(a: float, b: float, c: float, d: float) -> int | None:
    """Orientation of a display matrix (x' = a x + c y, y' = b x + d y); None if it is no multiple of 90 degrees."""
    if a and d and not b and not c:
        return _NUMBER[False, a < 0, d < 0]
    if b and c and not a and not d:
        return _NUMBER[True, c < 0, b < 0]
    return None


def from_turn_and_mirror(quarter_turns: int, mirror_columns: bool, mirror_rows: bool) -> int:
    """Orientation of a turn by quarter_turns * 90 degrees anticlockwise, followed by mirroring."""
    transpose, columns, rows = _STEPS[(1, 8, 3, 6)[quarter_turns % 4]]
    return _NUMBER[transpose, columns != mirror_columns, rows != mirror_rows]


def from_exif(tiff: bytes) -> int:
    """Orientation in an EXIF block (bytes from the TIFF header on); 1 if there is none or it cannot be read."""
    order: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
    if tiff[:4] not in order:
        return 1
    endian = order[tiff[:4]]

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], endian)

    directory = number(4, 4)
    if directory + 2 > len(tiff):
        return 1
    for entry in range(min(number(directory, 2), 512)):
        at = directory + 2 + 12 * entry
        # Tag 0x0112, one value of type SHORT.
        if number(at, 2) == 0x0112 and number(at + 2, 2) == 3:
            value = number(at + 8, 2)
            return value if value in _STEPS else 1
    return 1
