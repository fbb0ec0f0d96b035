"""Attention over packed segments, the slow and obvious way: what every fast path is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def packed_attention(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], key_starts: Sequence[int]) -> Tensor:
    """Softmax attention inside each segment, in float64.

    q: [N, H, D]; k, v: [M, H, D]; starts, key_starts: W + 1 segment starts of the queries and of the keys.
    Returns float64 [N, H, D].
    """
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for segment in range(len(starts) - 1):
        rows = slice(starts[segment], starts[segment + 1])
        keys = slice(key_starts[segment], key_starts[segment + 1])
        for head in range(q.shape[1]):
            scores = q[rows, head].double() @ k[keys, head].double().T / q.shape[2] ** 0.5
            out[rows, head] = torch.softmax(scores, dim=-1) @ v[keys, head].double()
    return out
