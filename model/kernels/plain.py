"""What the Triton kernels compute, in plain torch, segment by segment: the CPU side of the custom ops.

Arguments as in launch.Problem. Everything in float32 (float64 for float64), rounded to the type of q where the kernels
round. Starts are read back to the host, so this is not for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.rope import rotate


class Gradients(NamedTuple):
    """Of q, k, v and the gains, in their types; None where there is no gain."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_gain: Tensor | None
    k_gain: Tensor | None


LOG2E = 1.4426950408889634


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    q_table: Tensor | None,
    k_table: Tensor | None,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Attention [N, H, D] in q's type and its log-sum-exp in base 2, [H, N]."""
    queries, keys, values = _wide(prepare(q, q_table, q_gain)), _wide(prepare(k, k_table, k_gain)), _wide(v)
    out = torch.zeros_like(queries)
    lse = torch.zeros(q.shape[1], q.shape[0], dtype=queries.dtype)
    for own, other in _segments(starts, key_starts):
        scores, _ = _scores(queries[own], keys[other], softcap)
        out[own] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), values[other])
        lse[:, own] = scores.logsumexp(-1) * LOG2E
    return out.to(q.dtype), lse.to(_stored(q))


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    q_table: Tensor | None,
    k_table: Tensor | None,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    softcap: float,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
) -> Gradients:
    """Gradients for `grad` [N, H, D] of what forward gave."""
    queries, keys, values = _wide(prepare(q, q_table, q_gain)), _wide(prepare(k, k_table, k_gain)), _wide(v)
    wide_grad = _wide(grad)
    delta = (_wide(out) * wide_grad).sum(-1).T  # [H, N]
    dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for own, other in _segments(starts, key_starts):
        scores, slope = _scores(queries[own], keys[other], softcap)
        weights = torch.exp2(scores * LOG2E - lse[:, own, None])
        dv[other] = torch.einsum("hij,ihd->jhd", weights, wide_grad[own])
        d_weights = torch.einsum("ihd,jhd->hij", wide_grad[own], values[other])
        d_scores = weights * (d_weights - delta[:, own, None]) * slope * q.shape[2] ** -0.5
        dq[own] = torch.einsum("hij,jhd->ihd", d_scores, keys[other])
        dk[other] = torch.einsum("hij,ihd->jhd", d_scores, queries[own])
    dq, dq_gain = _prepare_backward(q, dq, q_table, q_gain)
    dk, dk_gain = _prepare_backward(k, dk, k_table, k_gain)
    return Gradients(dq, dk, dv.to(v.dtype), dq_gain, dk_gain)


def prepare(x: Tensor, table: Tensor | None, gain: Tensor | None) -> Tensor:
    """The norm of each head, with a gain, then the rotation, with a table; rounded to x's type after each."""
    if gain is not None:
        unit = F.normalize(_wide(x), dim=-1, eps=1e-12)
        x = (unit * (_wide(gain) * x.shape[-1] ** 0.5)).to(x.dtype)
    return x if table is None else rotate(x, table)


def _prepare_backward(
    x: Tensor, grad: Tensor, table: Tensor | None, gain: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if table is not None:
        back = table * table.new_tensor([1, -1]).repeat(table.shape[1] // 2)
        grad = rotate(grad, back)
    if gain is None:
        return grad.to(x.dtype), None
    length = _wide(x).norm(dim=-1, keepdim=True)
    unit = _wide(x) / length.clamp(min=1e-12)
    scaled = grad * _wide(gain) * x.shape[-1] ** 0.5
    along = (scaled * unit).sum(-1, keepdim=True) * (length > 1e-12)
    dx = (scaled - unit * along) / length.clamp(min=1e-12)
    return dx.to(x.dtype), ((grad * unit).sum(0) * x.shape[-1] ** 0.5).to(gain.dtype)


def _scores(queries: Tensor, keys: Tensor, softcap: float) -> tuple[Tensor, Tensor | float]:
    scores = torch.einsum("ihd,jhd->hij", queries, keys) * queries.shape[2] ** -0.5
    if softcap == 0:
        return scores, 1.0
    tanh = torch.tanh(scores / softcap)
    return softcap * tanh, 1 - tanh * tanh


def _segments(starts: Tensor, key_starts: Tensor) -> Iterator[tuple[slice, slice]]:
    rows, keys = starts.tolist(), key_starts.tolist()
    for i in range(len(rows) - 1):
        if rows[i] < rows[i + 1] and keys[i] < keys[i + 1]:
            yield slice(rows[i], rows[i + 1]), slice(keys[i], keys[i + 1])


def _stored(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(_stored(x))
