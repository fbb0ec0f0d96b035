"""What the kernels share: finding a tile's segment, loading rows of a head (normed and rotated), products, scores.

A head of D channels is held as two blocks of HEAD and TAIL columns (72: 64 + 16, half of the second masked). TAIL = 0:
there is no second block, and the first stands in its place, unused. Whatever lies outside of a segment is zero at the
load: masking scores alone is not enough, since 0 times a neighbour's NaN is NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
MASKED = tl.constexpr(-1e30)  # not -inf: -inf minus -inf would be NaN


@triton.jit
def load_start(starts, segment, rows):
    """Where a segment starts, from 0 to rows whatever the memory says: wrong starts may not reach other memory."""
    return tl.minimum(tl.maximum(tl.load(starts + segment), 0), rows)


@triton.jit
def find_tile(starts, segments, rows, BLOCK: tl.constexpr):
    """Segment, first row and end of the rows of this program's tile; a tile without rows has first >= stop.

    Segment s owns the slots from starts[s] // BLOCK + s on: at least as many as it has tiles, at most one more, so
    that the grid follows from shapes alone and no list of tiles has to be made. First is never below 0, stop never
    above rows.
    """
    slot = tl.program_id(0)
    low = 0
    high = segments - 1
    while low < high:
        middle = (low + high + 1) // 2
        fits = load_start(starts, middle, rows) // BLOCK + middle <= slot
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle - 1)
    begin = load_start(starts, low, rows)
    stop = load_start(starts, low + 1, rows)
    return low, begin + (slot - begin // BLOCK - low) * BLOCK, stop


@triton.jit
def load_block(base, rows, inside, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns FIRST to FIRST + WIDTH of some rows; zero outside of `inside` and beyond column D."""
    columns = FIRST + tl.arange(0, WIDTH)
    mask = inside[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (columns < D)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_head(base, rows, inside, stride, HEAD: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr):
    """Rows of one head as stored, in two blocks."""
    head = load_block(base, rows, inside, stride, 0, HEAD, D)
    tail = head
    if TAIL > 0:
        tail = load_block(base, rows, inside, stride, HEAD, TAIL, D)
    return head, tail


@triton.jit
def store_block(base, rows, inside, stride, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Write x, in the type of the memory, to columns FIRST to FIRST + WIDTH of some rows."""
    columns = FIRST + tl.arange(0, WIDTH)
    mask = inside[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (columns < D)[None, :]
    to = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(to, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def store_head(base, rows, inside, stride, head, tail, HEAD: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr):
    """Write two blocks of a head."""
    store_block(base, rows, inside, stride, head, 0, HEAD, D)
    if TAIL > 0:
        store_block(base, rows, inside, stride, tail, HEAD, TAIL, D)


@triton.jit
def rotate_block(x, table, SIGN: tl.constexpr):
    """Turn pairs (2j, 2j + 1) of float32 x by angles whose cosine and sine are the pairs of `table`."""
    ROWS: tl.constexpr = x.shape[0]
    PAIRS: tl.constexpr = x.shape[1] // 2
    a, b = tl.split(tl.reshape(x, (ROWS, PAIRS, 2)))
    cos, sin = tl.split(tl.reshape(table, (ROWS, PAIRS, 2)))
    sin = sin * SIGN
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (ROWS, 2 * PAIRS))


@triton.jit
def rotate_head(
    head, tail, table, rows, inside, SIGN: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr
):
    """Both blocks, float32, by the table's row of each token. SIGN -1 turns back."""
    head = rotate_block(head, load_block(table, rows, inside, D, 0, HEAD, D), SIGN)
    if TAIL > 0:
        tail = rotate_block(tail, load_block(table, rows, inside, D, HEAD, TAIL, D), SIGN)
    return head, tail


@triton.jit
def load_gain(gain, head_index, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Gain times sqrt(D) of the columns of one block."""
    columns = FIRST + tl.arange(0, WIDTH)
    return tl.load(gain + head_index * D + columns, mask=columns < D, other=0.0).to(tl.float32) * (D**0.5)


@triton.jit
def unit_head(head, tail, TAIL: tl.constexpr):
    """Rows over their length, in float32, and the length (at least 1e-12)."""
    head = head.to(tl.float32)
    square = tl.sum(head * head, 1)
    if TAIL > 0:
        tail = tail.to(tl.float32)
        square += tl.sum(tail * tail, 1)
    length = tl.maximum(tl.sqrt(square), 1e-12)
    head = head / length[:, None]
    if TAIL > 0:
        tail = tail / length[:, None]
    return head, tail, length


@triton.jit
def load_prepared(
    base,
    table,
    gain,
    head_index,
    rows,
    inside,
    stride,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    D: tl.constexpr,
):
    """Rows of one head, normed and rotated in float32, rounded to the model's type after each, as published."""
    dtype = base.dtype.element_ty
    head, tail = load_head(base, rows, inside, stride, HEAD, TAIL, D)
    if NORM:
        head, tail, _ = unit_head(head, tail, TAIL)
        head = (head * load_gain(gain, head_index, 0, HEAD, D)[None, :]).to(dtype)
        if TAIL > 0:
            tail = (tail * load_gain(gain, head_index, HEAD, TAIL, D)[None, :]).to(dtype)
    if ROTATE:
        head, tail = rotate_head(head.to(tl.float32), tail.to(tl.float32), table, rows, inside, 1.0, HEAD, TAIL, D)
        head, tail = head.to(dtype), tail.to(dtype)
    return head, tail


@triton.jit
def products(a_head, a_tail, b_head, b_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over all channels of the head, float32."""
    out = tl.dot(a_head, tl.trans(b_head), input_precision=PRECISION)
    if TAIL > 0:
        out = tl.dot(a_tail, tl.trans(b_tail), out, input_precision=PRECISION)
    return out


@triton.jit
def capped(product, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """SOFTCAP * tanh(SCALE * product / SOFTCAP) and its derivative by SCALE * product; SOFTCAP 0: no cap."""
    scores = product * SCALE
    slope = 1.0
    if SOFTCAP > 0:
        # The interpreter has no tanh. exp2 of a large number is inf, which gives 1 as it should.
        tanh = 1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E / SOFTCAP)) + 1.0)
        scores = SOFTCAP * tanh
        slope = 1.0 - tanh * tanh
    return scores, slope
