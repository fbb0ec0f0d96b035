"""Launch settings of the Triton kernels: one fixed table, never a tuner.

The key is what the model and the machine are (architecture, head width, float type, direction), never what is in the
batch: a setting that followed the batch would change an item's bits with its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from model.errors import UnsupportedError

Direction = Literal["forward", "keys", "queries"]
"""The attention kernels: forward, gradients of keys and values, gradients of queries."""

ARCHITECTURES = (80, 89, 90, 100)
"""Compute capabilities with an entry. Others take that of the next lower one whose shared memory is not larger."""

SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory that one block may have. Triton compiles a block that is too large; only its launch fails."""

WIDTHS = (64, 72, 80, 96, 128)
"""Head widths that the table was made for; any other multiple of 8 from 16 to 128 takes the entry of the next one."""


@dataclass(frozen=True)
class Tile:
    """held: rows of a block's own tile; streamed: rows of a step of its loop; rotate_keys: in the loop or before;
    copies: by the copy engine of sm_90 and later (TMA), which saves registers and needs keys rotated before.
    """

    held: int
    streamed: int
    warps: int
    stages: int
    rotate_keys: bool = False
    copies: bool = False


@dataclass(frozen=True)
class LinearTile:
    """rows, columns: of a block's tile of the result; inner: channels of a step of its loop."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def split_width(width: int) -> tuple[int, int]:
    """A head as two powers of two, (72: 64 + 16), so that nothing is padded to 128. The second may be 0."""
    if width % 8 or not 16 <= width <= 128:
        raise UnsupportedError(f"head width {width} on CUDA; wanted a multiple of 8 from 16 to 128")
    first = 1 << (width.bit_length() - 1)
    rest = width - first
    return first, max(16, 1 << (rest - 1).bit_length()) if rest else 0


def lookup(arch: int, width: int, dtype: torch.dtype, direction: Direction, capped: bool = False) -> Tile:
    """The setting for one kernel. arch: compute capability as a number (90); dtype: of q, k and v; capped: softcap."""
    kind = "narrow" if width <= 80 else "wide"
    key = _entry(arch), kind, _bits(dtype), direction
    return CAPPED.get(key, TABLE[key]) if capped else TABLE[key]


def lookup_linear(arch: int, dtype: torch.dtype) -> LinearTile:
    """The setting of the linear kernel: never by the number of rows, nor by the layer's widths."""
    return LINEAR[_entry(arch), _bits(dtype)]


def _entry(arch: int) -> int:
    if arch < ARCHITECTURES[0]:
        raise UnsupportedError(f"a GPU of compute capability {arch / 10}; wanted 8.0 or newer")
    # 8.6 and 12.x have the small shared memory of 8.9.
    return 89 if 80 < arch < 90 or arch >= 120 else max(a for a in ARCHITECTURES if a <= arch)


def _bits(dtype: torch.dtype) -> str:
    return "32" if dtype == torch.float32 else "16"


TABLE: dict[tuple[int, str, str, Direction], Tile] = {
    (80, "narrow", "16", "forward"): Tile(128, 64, 8, 3),
    (80, "narrow", "16", "keys"): Tile(128, 32, 8, 2),
    (80, "narrow", "16", "queries"): Tile(128, 32, 8, 2),
    (80, "narrow", "32", "forward"): Tile(64, 32, 8, 2),
    (80, "narrow", "32", "keys"): Tile(32, 32, 8, 2),
    (80, "narrow", "32", "queries"): Tile(32, 32, 8, 2),
    (80, "wide", "16", "forward"): Tile(128, 64, 8, 2),
    (80, "wide", "16", "keys"): Tile(64, 32, 8, 2),
    (80, "wide", "16", "queries"): Tile(128, 32, 8, 2),
    (80, "wide", "32", "forward"): Tile(64, 32, 8, 2),
    (80, "wide", "32", "keys"): Tile(32, 32, 8, 2),
    (80, "wide", "32", "queries"): Tile(32, 32, 8, 1),
    (89, "narrow", "16", "forward"): Tile(128, 64, 8, 3),
    (89, "narrow", "16", "keys"): Tile(128, 32, 8, 2),
    (89, "narrow", "16", "queries"): Tile(128, 32, 8, 2),
    (89, "narrow", "32", "forward"): Tile(64, 32, 8, 2),
    (89, "narrow", "32", "keys"): Tile(32, 32, 8, 2),
    (89, "narrow", "32", "queries"): Tile(16, 32, 4, 1),
    (89, "wide", "16", "forward"): Tile(128, 64, 8, 2),
    (89, "wide", "16", "keys"): Tile(64, 32, 8, 2),
    (89, "wide", "16", "queries"): Tile(128, 32, 8, 2),
    (89, "wide", "32", "forward"): Tile(64, 32, 8, 2),
    (89, "wide", "32", "keys"): Tile(32, 16, 4, 1),
    (89, "wide", "32", "queries"): Tile(32, 16, 8, 1),
    (90, "narrow", "16", "forward"): Tile(128, 64, 8, 2),
    (90, "narrow", "16", "keys"): Tile(128, 64, 8, 2),
    (90, "narrow", "16", "queries"): Tile(128, 64, 8, 2),
    (90, "narrow", "32", "forward"): Tile(64, 32, 8, 2),
    (90, "narrow", "32", "keys"): Tile(32, 32, 8, 2),
    (90, "narrow", "32", "queries"): Tile(32, 16, 4, 1),
    (90, "wide", "16", "forward"): Tile(128, 64, 8, 2),
    (90, "wide", "16", "keys"): Tile(128, 32, 8, 2),
    (90, "wide", "16", "queries"): Tile(128, 64, 8, 2),
    (90, "wide", "32", "forward"): Tile(64, 16, 8, 2),
    (90, "wide", "32", "keys"): Tile(32, 16, 4, 1),
    (90, "wide", "32", "queries"): Tile(32, 16, 8, 1),
    (100, "narrow", "16", "forward"): Tile(128, 64, 8, 2),
    (100, "narrow", "16", "keys"): Tile(128, 64, 8, 2),
    (100, "narrow", "16", "queries"): Tile(128, 64, 8, 2),
    (100, "narrow", "32", "forward"): Tile(32, 64, 8, 2),
    (100, "narrow", "32", "keys"): Tile(32, 32, 8, 2),
    (100, "narrow", "32", "queries"): Tile(32, 32, 8, 2),
    (100, "wide", "16", "forward"): Tile(128, 64, 8, 2),
    (100, "wide", "16", "keys"): Tile(128, 64, 8, 2),
    (100, "wide", "16", "queries"): Tile(128, 64, 8, 2),
    (100, "wide", "32", "forward"): Tile(32, 64, 8, 2),
    (100, "wide", "32", "keys"): Tile(32, 16, 4, 1),
    (100, "wide", "32", "queries"): Tile(32, 16, 4, 1),
}

CAPPED: dict[tuple[int, str, str, Direction], Tile] = {
    (100, "narrow", "16", "forward"): Tile(64, 64, 4, 2),
    (100, "wide", "16", "forward"): Tile(64, 64, 4, 2),
}
"""What replaces an entry where scores are capped: with the cap that of sm_100 spills at 72, 80 and 96."""

LINEAR: dict[tuple[int, str], LinearTile] = {
    (80, "16"): LinearTile(128, 128, 32, 4, 4),
    (80, "32"): LinearTile(64, 128, 32, 8, 2),
    (89, "16"): LinearTile(128, 128, 32, 4, 3),
    (89, "32"): LinearTile(64, 128, 32, 8, 2),
    (90, "16"): LinearTile(128, 256, 64, 8, 3),
    (90, "32"): LinearTile(64, 128, 16, 8, 2),
    (100, "16"): LinearTile(128, 256, 64, 8, 3),
    (100, "32"): LinearTile(64, 64, 32, 8, 2),
}
