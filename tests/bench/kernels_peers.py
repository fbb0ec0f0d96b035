"""Attention over packed segments as a user could plug it in, each with a rotation of queries and keys before it.

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

from model.kernels import packed_attention
from model.rope import rotate

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class FusedRotation(torch.autograd.Function):
    """Rotation as one pass over memory, by our own kernel: the best that a peer can have in front of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return _rotated(x, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        back = table * table.new_tensor([1, -1]).repeat(table.shape[1] // 2)
        return _rotated(grad.contiguous(), back), None


def _rotated(x: Tensor, table: Tensor) -> Tensor:
    from model.kernels import launch

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch.plan_prepare(x, table, None, out).run()
    return out


def with_rotation(attention: Attention, rotary: Tensor, *, fused: bool) -> Attention:
    """The peer with queries and keys rotated first."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if fused:
            return attention(FusedRotation.apply(q, rotary), FusedRotation.apply(k, rotary), v)
        return attention(rotate(q, rotary), rotate(k, rotary), v)

    return run


def ours(starts: Sequence[int], rotary: Tensor) -> Attention:
    """packed_attention with the rotation in it."""
    held = torch.tensor(starts, dtype=torch.int32, device=rotary.device)
    return lambda q, k, v: packed_attention(q, k, v, held, rotary=rotary)


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


PEERS: dict[str, Callable[[Sequence[int], torch.device], Attention]] = {
    "torch varlen": varlen,
    "flash-attn": flash_attn,
    "padded SDPA, cuDNN": lambda starts, device: padded(starts, device, SDPBackend.CUDNN_ATTENTION),
    "padded SDPA, flash": lambda starts, device: padded(starts, device, SDPBackend.FLASH_ATTENTION),
    "padded SDPA, efficient": lambda starts, device: padded(starts, device, SDPBackend.EFFICIENT_ATTENTION),
    "FlexAttention": flex,  # last: it compiles for each shape
}
