"""4D rotary position embedding: one table per forward, shared by all blocks and heads.

N tokens, H heads, D head width. Axis order t, x, y, z; D // 8 frequencies an axis, D / 2 channel pairs in all.
"""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10000.0


def frequencies(head_width: int) -> Tensor:
    """The D // 8 frequencies of every axis, float64: BASE ** (-i / D). The exponent is i/D, as published, not 2i/D."""
    return BASE ** (-torch.arange(head_width // 8, dtype=torch.float64) / head_width)


def rotary_table(coords: Tensor, head_width: int) -> Tensor:
    """Cosine and sine of every angle.

    coords: int [N, 4], t x y z, t counted inside the window. Returns float32 [N, D]: cos and sin of pair j in columns
    2j and 2j + 1, where the pair's channels are.
    Angles are taken in float64 first: float32 costs 2e-4 at coordinates in the thousands.
    Source: facts 6; conformance/rope_72.
    """
    freqs = frequencies(head_width).to(coords.device)
    angles = (coords.double()[:, :, None] * freqs).flatten(1)  # [N, 4 * D // 8]
    return torch.stack((angles.cos(), angles.sin()), -1).flatten(1).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn channel pairs (2j, 2j + 1) by their angles.

    x: [N, H, D], any float dtype; table: of rotary_table. Computed in float32 (float64 for float64), returned in x's
    dtype.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    # (a + ib) (cos + i sin): one product of complex numbers is the fastest form on a CPU.
    pairs, turns = (torch.view_as_complex(y.unflatten(-1, (-1, 2))) for y in (wide, table.to(wide.dtype)[:, None]))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
