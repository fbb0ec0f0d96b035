"""Attention over packed segments with torch's scaled_dot_product_attention: no padding, no mask, any device.

N queries, M keys (M = N but for a cached prefix), H heads, D head width, W segments.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import ShapeError


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], *, key_starts: Sequence[int] | None = None
) -> Tensor:
    """Let every query attend to all keys of its own segment.

    q: [N, H, D]; k, v: [M, H, D], same dtype, already normed and rotated. starts: W + 1 ints, first 0, last N.
    key_starts: the same for the keys where they are longer than the queries (a cached prefix); default: starts.
    Returns [N, H, D] in q's dtype. Raises ShapeError for sizes or starts that do not fit.
    """
    key_starts = starts if key_starts is None else key_starts
    _check(q, k, v, starts, key_starts)
    # A fixed-size output that segments are written into would break autograd, so the runs are concatenated.
    runs = []
    for start, count, length, key_start, key_length in _equal_runs(starts, key_starts):
        rows = q[start : start + count * length].unflatten(0, (count, length))
        keys = k[key_start : key_start + count * key_length].unflatten(0, (count, key_length))
        values = v[key_start : key_start + count * key_length].unflatten(0, (count, key_length))
        # [count, H, length, D] views: nothing is copied before the kernel.
        run = F.scaled_dot_product_attention(rows.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
        runs.append(run.transpose(1, 2).flatten(0, 1))
    if not runs:
        return torch.zeros_like(q)
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


def _check(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], key_starts: Sequence[int]) -> None:
    if q.ndim != 3 or k.shape != v.shape or k.ndim != 3 or q.shape[1:] != k.shape[1:]:
        raise ShapeError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; wanted [N, H, D], twice [M, H, D]"
        )
    for name, ends, total in (("starts", starts, q.shape[0]), ("key_starts", key_starts, k.shape[0])):
        if len(ends) < 1 or ends[0] != 0 or ends[-1] != total or any(b < a for a, b in itertools.pairwise(ends)):
            raise ShapeError(f"{name} of {list(ends)[:8]}...; wanted non-decreasing from 0 to {total}")
    if len(starts) != len(key_starts):
        raise ShapeError(f"{len(starts)} starts and {len(key_starts)} key_starts; wanted as many")
