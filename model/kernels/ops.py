"""Attention as two custom ops, forward and backward, which torch.compile, autograd and checkpointing see as one step.

On a CUDA device they launch the Triton kernels, which is when triton is imported; on a CPU they are plain torch.
Arguments as in launch.Problem.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.kernels import plain


@torch.library.custom_op("atoken::packed_attention", mutates_args=(), device_types="cpu")
def packed_attention(
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
    """Attention [N, H, D] and its log-sum-exp in base 2, [H, N], which has no gradient."""
    return plain.forward(q, k, v, starts, key_starts, q_table, k_table, q_gain, k_gain, softcap)


@torch.library.custom_op("atoken::packed_attention_backward", mutates_args=(), device_types="cpu")
def packed_attention_backward(
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
) -> list[Tensor]:
    """Gradients of q, k and v, contiguous, then of the gains that are there."""
    given = plain.backward(q, k, v, starts, key_starts, q_table, k_table, q_gain, k_gain, softcap, out, lse, grad)
    return [gradient for gradient in given if gradient is not None]


@packed_attention.register_kernel("cuda")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    from model.kernels import launch

    device = arguments[0].device
    with torch.cuda.device(device):
        return launch.forward(launch.Problem(*(*arguments, launch.device_arch(device))))


@packed_attention_backward.register_kernel("cuda")
def _(*arguments: Any) -> list[Tensor]:
    from model.kernels import launch

    *problem, out, lse, grad = arguments
    device = out.device
    with torch.cuda.device(device):
        given = launch.backward(launch.Problem(*(*problem, launch.device_arch(device))), out, lse, grad)
    return [gradient for gradient in given if gradient is not None]


@packed_attention.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=wide)


@packed_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    gains = [gain for gain in rest[4:6] if gain is not None]
    return [x.new_empty(x.shape) for x in (q, k, v, *gains)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.softcap = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.has_gain = [gain is not None for gain in tensors[7:9]]
    ctx.save_for_backward(*tensors, out, lse)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    dq, dk, dv, *gains = packed_attention_backward(*tensors, ctx.softcap, out, lse, grad)
    dq_gain, dk_gain = (gains.pop(0) if has else None for has in ctx.has_gain)
    return dq, dk, dv, None, None, None, None, dq_gain, dk_gain, None


packed_attention.register_autograd(_backward, setup_context=_setup_context)
