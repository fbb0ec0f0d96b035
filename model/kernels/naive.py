"""Attention over packed segments, the slow and obvious way: what every fast path is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Sequence[int],
    key_starts: Sequence[int],
    *,
    q_table: Tensor | None = None,
    k_table: Tensor | None = None,
    q_gain: Tensor | None = None,
    k_gain: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Softmax attention inside each segment, in float64; autograd gives the gradients.

    q: [N, H, D]; k, v: [M, H, D]; starts, key_starts: W + 1 segment starts of the queries and of the keys.
    q_table, k_table: cos and sin of every pair's angle in turns, [N, D] and [M, D], or None for no rotation.
    q_gain, k_gain: [H, D] of the norm of each head, or None for no norm. softcap: 0 for none.
    Returns float64 [N, H, D].
    """
    q, k = _rotate(_norm(q.double(), q_gain), q_table), _rotate(_norm(k.double(), k_gain), k_table)
    parts = []
    for segment in range(len(starts) - 1):
        rows = slice(starts[segment], starts[segment + 1])
        keys = slice(key_starts[segment], key_starts[segment + 1])
        for head in range(q.shape[1]):
            scores = q[rows, head] @ k[keys, head].T / q.shape[2] ** 0.5
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            parts.append(torch.softmax(scores, dim=-1) @ v[keys, head].double())
    if not parts:
        return torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    by_head = [torch.cat(parts[head :: q.shape[1]]) for head in range(q.shape[1])]
    return torch.stack(by_head, dim=1)


def _norm(x: Tensor, gain: Tensor | None) -> Tensor:
    if gain is None:
        return x
    length = (x * x).sum(-1, keepdim=True).sqrt()
    return x / length.clamp(min=1e-12) * gain.double() * x.shape[2] ** 0.5


def _rotate(x: Tensor, table: Tensor | None) -> Tensor:
    if table is None:
        return x
    angles = torch.view_as_complex(table.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * angles[:, None]).flatten(-2)
