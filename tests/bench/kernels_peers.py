"""Attention over packed segments as a user could plug it in, with the norm and rotation of queries and keys before it.

A peer is made once for some segments (masks and index lists are not timed) and takes q, k, v [N, H, D].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.kernels import packed_attention, plain

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Make = Callable[[Sequence[int], torch.device], Attention]
Gains = tuple[Tensor, Tensor]


class FusedPreparation(torch.autograd.Function):
    """Norm and rotation as one pass over memory, by our own kernel: the best that a peer can have in front of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, gain: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, table, gain)
        return _prepared(x, table, gain, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:
        from model.kernels import launch

        x, table, gain = ctx.saved_tensors
        back = table * table.new_tensor([1, -1]).repeat(table.shape[1] // 2)
        if gain is None:
            return _prepared(grad.contiguous(), back, None, grad.dtype), None, None
        turned = _prepared(grad.contiguous(), back, None, torch.float32)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        blocks = -(-len(x) // launch.NORM_BACKWARD_ROWS)
        shares = torch.empty(blocks, *gain.shape, dtype=torch.float32, device=x.device)
        launch.plan_norm_backward(x, turned, gain, dx, shares).run()
        return dx, None, shares.sum(0).to(gain.dtype)


def _prepared(x: Tensor, table: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    from model.kernels import launch

    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    launch.plan_prepare(x, table, gain, out).run()
    return out


def with_preparation(attention: Attention, rotary: Tensor, gains: Gains | None, *, fused: bool) -> Attention:
    """The peer with queries and keys normed (with gains) and rotated first."""
    q_gain, k_gain = gains or (None, None)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if fused:
            return attention(FusedPreparation.apply(q, rotary, q_gain), FusedPreparation.apply(k, rotary, k_gain), v)
        return attention(plain.prepare(q, rotary, q_gain), plain.prepare(k, rotary, k_gain), v)

    return run


def ours(starts: Sequence[int], rotary: Tensor, gains: Gains | None) -> Attention:
    """packed_attention with the norm and the rotation in it."""
    held = torch.tensor(starts, dtype=torch.int32, device=rotary.device)
    q_gain, k_gain = gains or (None, None)
    return lambda q, k, v: packed_attention(q, k, v, held, rotary=rotary, q_gain=q_gain, k_gain=k_gain)


def varlen(starts: Sequence[int], device: torch.device) -> Attention:
    """torch.nn.attention.varlen: flash attention 2 as torch ships it."""
    from torch.nn.attention.varlen import varlen_attn

    held = torch.tensor(starts, dtype=torch.int32, device=device)
    longest = max(b - a for a, b in itertools.pairwise(starts))
    return lambda q, k, v: varlen_attn(q, k, v, held, held, longest, longest)


def flash_attn(starts: Sequence[int], device: torch.device) -> Attention:
    """The flash-attn package, where it is installed."""
    from flash_attn import flash_attn_varlen_func

    held = torch.tensor(starts, dtype=torch.int32, device=device)
    longest = max(b - a for a, b in itertools.pairwise(starts))
    return lambda q, k, v: flash_attn_varlen_func(q, k, v, held, held, longest, longest)


def flex(starts: Sequence[int], device: torch.device) -> Attention:
    """FlexAttention, compiled, with a mask by document."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor(starts, device=device).diff()
    document = torch.arange(len(lengths), device=device).repeat_interleave(lengths)

    def same(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return document[i] == document[j]

    mask = torch.compile(create_block_mask)(same, None, None, starts[-1], starts[-1], device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return run


def padded(starts: Sequence[int], device: torch.device, backend: SDPBackend) -> Attention:
    """scaled_dot_product_attention over segments padded to the longest; a mask only where lengths differ."""
    lengths = [b - a for a, b in itertools.pairwise(starts)]
    longest = max(lengths)
    places = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(lengths)]).to(device)
    equal = len(set(lengths)) == 1
    there = torch.zeros(len(lengths) * longest, dtype=torch.bool, device=device).index_fill(0, places, True)
    mask = None if equal else there.view(len(lengths), 1, 1, longest)

    def spread(x: Tensor) -> Tensor:
        if not equal:
            x = x.new_zeros(len(lengths) * longest, *x.shape[1:]).index_copy(0, places, x)
        return x.unflatten(0, (len(lengths), longest)).transpose(1, 2)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(spread(q), spread(k), spread(v), attn_mask=mask)
        out = out.transpose(1, 2).flatten(0, 1)
        return out if equal else out[places]

    return run


PEERS: dict[str, Make] = {
    "torch varlen": varlen,
    "flash-attn": flash_attn,
    "padded SDPA, cuDNN": lambda starts, device: padded(starts, device, SDPBackend.CUDNN_ATTENTION),
    "padded SDPA, flash": lambda starts, device: padded(starts, device, SDPBackend.FLASH_ATTENTION),
    "padded SDPA, efficient": lambda starts, device: padded(starts, device, SDPBackend.EFFICIENT_ATTENTION),
}
SLOW_PEERS: dict[str, Make] = {"FlexAttention": flex}
"""They compile for each shape: measured last."""
