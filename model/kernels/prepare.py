"""QK norm and rotation of all rows, once, for what the attention kernels read more than once; and its backward."""

from __future__ import annotations

import triton
import triton.language as tl

from model.kernels.rows import load_gain, load_head, load_prepared, store_head, unit_head


@triton.jit(do_not_specialize=["rows", "heads", "stride"])
def prepare_kernel(
    x, out, table, gain, rows, heads, stride,
    NORM: tl.constexpr, ROTATE: tl.constexpr,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some rows of one head of x, stride in units of 8 elements, to out [rows, heads, D]."""
    head_index = tl.program_id(1)
    column = head_index.to(tl.int64) * D
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = own < rows
    head, tail = load_prepared(
        x + column, table, gain, head_index, own, inside, stride * 8, NORM, ROTATE, HEAD, TAIL, D
    )
    store_head(out + column, own, inside, heads * D, head, tail, HEAD, TAIL, D)


@triton.jit(do_not_specialize=["rows", "heads", "stride"])
def norm_backward_kernel(
    x, grad, gain, dx, dgain, rows, heads, stride,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the norm for some rows of one head: dx, and this block's share of the gain's, [blocks, heads, D]."""
    head_index = tl.program_id(1)
    column = head_index.to(tl.int64) * D
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = own < rows
    x_head, x_tail = load_head(x + column, own, inside, stride * 8, HEAD, TAIL, D)
    u_head, u_tail, length = unit_head(x_head, x_tail, TAIL)
    g_head, g_tail = load_head(grad + column, own, inside, heads * D, HEAD, TAIL, D)
    share = dgain + (tl.program_id(0).to(tl.int64) * heads + head_index) * D
    tl.store(share + tl.arange(0, HEAD), tl.sum(g_head * u_head, 0) * (D**0.5))
    d_head = g_head * load_gain(gain, head_index, 0, HEAD, D)[None, :]
    along = tl.sum(d_head * u_head, 1)
    d_tail = d_head
    if TAIL > 0:
        columns = HEAD + tl.arange(0, TAIL)
        tl.store(share + columns, tl.sum(g_tail * u_tail, 0) * (D**0.5), mask=columns < D)
        d_tail = g_tail * load_gain(gain, head_index, HEAD, TAIL, D)[None, :]
        along += tl.sum(d_tail * u_tail, 1)
    along = tl.where(length > 1e-12, along, 0.0)  # at the floor the length is a constant
    d_head = (d_head - u_head * along[:, None]) / length[:, None]
    if TAIL > 0:
        d_tail = (d_tail - u_tail * along[:, None]) / length[:, None]
    store_head(dx + column, own, inside, heads * D, d_head, d_tail, HEAD, TAIL, D)
