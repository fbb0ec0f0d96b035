"""Attention over packed segments with torch's scaled_dot_product_attention: no padding, no mask, any device.

N queries, M keys (M = N but for a cached prefix), H heads, D head width, W segments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_attention(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], key_starts: Sequence[int]) -> Tensor:
    """Let every query attend to all keys of its own segment.

    q: [N, H, D]; k, v: [M, H, D], same dtype, already normed and rotated; starts, key_starts: W + 1 ints. All of it
    checked by the door. Returns [N, H, D] in q's dtype.
    """
    # A fixed-size output that segments are written into would break autograd, so the runs are concatenated.
    runs = []
    for start, count, length, key_start, key_length in _equal_runs(starts, key_starts):
        rows = q[start : start + count * length].unflatten(0, (count, length))
        keys = k[key_start : key_start + count * key_length].unflatten(0, (count, key_length))
        values = v[key_start : key_start + count * key_length].unflatten(0, (count, key_length))
        # [count, H, length, D] views: nothing is copied before the kernel.
        run = F.scaled_dot_product_attention(rows.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
        runs.append(run.transpose(1, 2).flatten(0, 1))
    return runs[0] if len(runs) == 1 else torch.cat(runs)


def _equal_runs(starts: Sequence[int], key_starts: Sequence[int]) -> Iterator[tuple[int, int, int, int, int]]:
    """Neighbouring segments of equal length go to the library in one call: many small images cost one launch."""
    lengths = [
        (starts[i + 1] - starts[i], key_starts[i + 1] - key_starts[i])
        for i in range(len(starts) - 1)
        if starts[i + 1] > starts[i]
    ]
    begins = [(starts[i], key_starts[i]) for i in range(len(starts) - 1) if starts[i + 1] > starts[i]]
    first = 0
    for i in range(1, len(lengths) + 1):
        if i == len(lengths) or lengths[i] != lengths[first]:
            yield begins[first][0], i - first, lengths[first][0], begins[first][1], lengths[first][1]
            first = i
