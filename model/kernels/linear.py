"""A linear layer whose rows give the same bits whatever the number of rows: the custom op and its door.

On a CUDA device it is a Triton kernel with one fixed tile, on a CPU torch's product of a fixed number of rows at a
time. For inference only: it has no gradient. N rows, K channels in, C channels out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import ShapeError, UnsupportedError

_CUDA_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

CPU_ROWS = 128
"""Rows of every product on a CPU, where with few a library takes another path; a fifth of its speed is lost."""

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def fixed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x @ weight.T + bias, summed in float32 (float64 for float64) in an order that does not depend on N.

    x: [..., K]; weight: [C, K], or a slice of one; bias: [C] or None; one float dtype. gelu: then the tanh form
    of GELU. Returns [..., C] in that dtype.
    The order does depend on K and C: rows that end early are to be padded, and columns cut off afterwards.
    Raises ShapeError (a ValueError) for what does not fit, UnsupportedError where a gradient would be wanted.
    """
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise ShapeError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)}; wanted [..., K] and [C, K]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"bias {tuple(bias.shape)}; wanted [{weight.shape[0]}]")
    allowed = _CUDA_DTYPES if x.is_cuda else (*_CUDA_DTYPES, torch.float64)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype not in allowed or tensor.dtype != x.dtype or tensor.device != x.device):
            raise ShapeError(
                f"{name} {tensor.dtype} on {tensor.device}; wanted one of {allowed} on one device for all of them"
            )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        raise UnsupportedError("fixed_linear has no gradient; wanted torch.no_grad() or torch.inference_mode()")
    rows = x.reshape(-1, x.shape[-1])
    rows, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (rows, weight))
    out: Tensor = fixed_linear_op(rows, weight, None if bias is None else bias.contiguous(), gelu)
    return out.unflatten(0, x.shape[:-1]) if x.ndim != 1 else out[0]


@torch.library.custom_op("atoken::fixed_linear", mutates_args=(), device_types="cpu")
def fixed_linear_op(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """The product [N, C] of x [N, K] and weight [C, K]."""
    if len(x) == 0:
        return x.new_empty(0, weight.shape[0])
    blocks = F.pad(x, (0, 0, 0, -len(x) % CPU_ROWS)).split(CPU_ROWS)
    weight = weight.contiguous()  # of a slice the libraries take other paths
    return torch.cat([_product(rows, weight, bias, gelu) for rows in blocks])[: len(x)].contiguous()


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """GELU is done before the padding goes: torch computes the last few values of a tensor differently."""
    if _ONEDNN and rows.dtype == torch.float32:
        name, form = ("gelu", "tanh") if gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, name, [], form)
    out = F.linear(rows, weight, bias)
    return F.gelu(out, approximate="tanh") if gelu else out


@fixed_linear_op.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    from model.kernels.launch import device_arch
    from model.kernels.linear_fwd import plan_linear

    with torch.cuda.device(x.device):
        out = torch.empty(len(x), weight.shape[0], dtype=x.dtype, device=x.device)
        plan_linear(x, weight, bias, out, device_arch(x.device)).run()
        return F.gelu(out, approximate="tanh") if gelu else out


@fixed_linear_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
