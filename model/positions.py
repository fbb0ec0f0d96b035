"""The learned 16 x 16 position table, resized to the extent of every window."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

TABLE_SIDE = 16


@lru_cache(maxsize=4096)
def resize_weights(size: int) -> Tensor:
    """The matrix that resizes one axis from 16 to `size`: float64 [size, 16], rows sum to 1.

    Bilinear with antialias, half-pixel centres, no corner alignment. Source: facts 4; conformance enc.pos_embed.
    """
    scale = TABLE_SIDE / size
    reach = max(scale, 1.0)
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    taps = torch.arange(TABLE_SIDE, dtype=torch.float64)
    first = (centres - reach + 0.5).floor().clamp(min=0)
    last = (centres + reach + 0.5).floor().clamp(max=TABLE_SIDE)
    weights = (1 - (taps + 0.5 - centres[:, None]).abs() / reach).clamp(min=0)
    weights = weights * ((taps >= first[:, None]) & (taps < last[:, None]))
    return weights / weights.sum(1, keepdim=True)


class PositionTable(nn.Module):
    """Adds where a token stands in its picture; entry (i, j) of the table is row 16 i + j, i along x (patch rows)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.position_embedding = nn.Embedding(TABLE_SIDE**2, width)

    def forward(self, coords: Tensor, starts: Sequence[int], extents: Sequence[tuple[int, int]]) -> Tensor:
        """Read the resized table at every token's (x, y).

        coords: int [N, 4]; starts: W + 1 window starts; extents: (rows, columns) of each window, that is its
        largest x and y plus 1. Returns [N, C] in the table's dtype; the resize itself is float32.
        """
        table = self.position_embedding.weight.float().unflatten(0, (TABLE_SIDE, TABLE_SIDE))
        offsets: dict[tuple[int, int], int] = {}
        resized: list[Tensor] = []
        total = 0
        for rows, columns in extents:
            if (rows, columns) in offsets:
                continue
            offsets[rows, columns] = total
            total += rows * columns
            along_x = resize_weights(rows).to(table)
            along_y = resize_weights(columns).to(table)
            # [rows, 16] x [16, 16 C] first, then [columns, 16] on each row.
            partial = (along_x @ table.flatten(1)).unflatten(1, (TABLE_SIDE, -1))
            resized.append(torch.matmul(along_y, partial).flatten(0, 1))
        lengths = torch.tensor([b - a for a, b in itertools.pairwise(starts)])
        places = torch.tensor([[offsets[extent], extent[1]] for extent in extents]).repeat_interleave(lengths, 0)
        places = places.to(coords.device)
        index = places[:, 0] + coords[:, 1] * places[:, 1] + coords[:, 2]
        return torch.cat(resized).index_select(0, index).to(self.position_embedding.weight.dtype)
