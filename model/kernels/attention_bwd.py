"""Attention inside each segment, backward: one kernel for keys and values, one for queries.

Each gradient is summed by the one block that owns its rows, in a fixed order and without atomics: the price is that
scores are computed twice (7 products instead of 5), the gain is that the same input always gives the same bits.
Queries and keys come normed and rotated; their gradients are turned back before they are stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.kernels.rows import (
    LOG2E,
    MASKED,
    capped,
    find_tile,
    load_head,
    load_start,
    products,
    rotate_head,
    store_head,
)

_NOT_SPECIALIZED = ["rows", "keys", "segments", "heads", "q_stride", "k_stride", "v_stride"]


@triton.jit(do_not_specialize=["rows", "heads"])
def delta_kernel(
    out, grad, delta, rows, heads, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr
):
    """delta[h, n] = sum over channels of out * grad, float32: what the softmax takes off every gradient of a score."""
    head_index = tl.program_id(1)
    column = head_index.to(tl.int64) * D
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = own < rows
    o_head, o_tail = load_head(out + column, own, inside, heads * D, HEAD, TAIL, D)
    g_head, g_tail = load_head(grad + column, own, inside, heads * D, HEAD, TAIL, D)
    total = tl.sum(o_head.to(tl.float32) * g_head.to(tl.float32), 1)
    if TAIL > 0:
        total += tl.sum(o_tail.to(tl.float32) * g_tail.to(tl.float32), 1)
    tl.store(delta + head_index.to(tl.int64) * rows + own, total, mask=inside)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def keys_kernel(
    q, k, v, grad, lse, delta, dk, dv, k_table, starts, key_starts,
    rows, keys, segments, heads, q_stride, k_stride, v_stride,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ROTATE: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, HELD: tl.constexpr, STREAMED: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values of one head, over all queries of its segment."""
    segment, first, stop = find_tile(key_starts, segments, keys, HELD)
    if first >= stop:
        return
    head_index = tl.program_id(1)
    column = head_index.to(tl.int64) * D
    own = first + tl.arange(0, HELD)
    inside = own < stop
    k_head, k_tail = load_head(k + column, own, inside, k_stride * 8, HEAD, TAIL, D)
    v_head, v_tail = load_head(v + column, own, inside, v_stride * 8, HEAD, TAIL, D)
    dk_head = tl.zeros((HELD, HEAD), tl.float32)
    dv_head = tl.zeros((HELD, HEAD), tl.float32)
    dk_tail, dv_tail = dk_head, dv_head
    if TAIL > 0:
        dk_tail = tl.zeros((HELD, TAIL), tl.float32)
        dv_tail = tl.zeros((HELD, TAIL), tl.float32)
    row_sums = head_index.to(tl.int64) * rows
    query_stop = load_start(starts, segment + 1, rows)
    for query in range(load_start(starts, segment, rows), query_stop, STREAMED):
        other = query + tl.arange(0, STREAMED)
        there = other < query_stop
        q_head, q_tail = load_head(q + column, other, there, q_stride * 8, HEAD, TAIL, D)
        g_head, g_tail = load_head(grad + column, other, there, heads * D, HEAD, TAIL, D)
        log_sum = tl.load(lse + row_sums + other, mask=there, other=float("inf"))  # exp2(-inf) = 0
        taken = tl.load(delta + row_sums + other, mask=there, other=0.0)
        scores, slope = capped(products(k_head, k_tail, q_head, q_tail, TAIL, PRECISION), SCALE, SOFTCAP)
        weights = tl.exp2(scores * LOG2E - log_sum[None, :])
        narrow = weights.to(v.dtype.element_ty)
        dv_head = tl.dot(narrow, g_head, dv_head, input_precision=PRECISION)
        if TAIL > 0:
            dv_tail = tl.dot(narrow, g_tail, dv_tail, input_precision=PRECISION)
        d_weights = products(v_head, v_tail, g_head, g_tail, TAIL, PRECISION)
        d_scores = (weights * (d_weights - taken[None, :]) * slope).to(q.dtype.element_ty)
        dk_head = tl.dot(d_scores, q_head, dk_head, input_precision=PRECISION)
        if TAIL > 0:
            dk_tail = tl.dot(d_scores, q_tail, dk_tail, input_precision=PRECISION)
    store_head(dv + column, own, inside, heads * D, dv_head, dv_tail, HEAD, TAIL, D)
    dk_head, dk_tail = dk_head * SCALE, dk_tail * SCALE
    if ROTATE:
        dk_head, dk_tail = rotate_head(dk_head, dk_tail, k_table, own, inside, -1.0, HEAD, TAIL, D)
    store_head(dk + column, own, inside, heads * D, dk_head, dk_tail, HEAD, TAIL, D)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def queries_kernel(
    q, k, v, grad, lse, delta, dq, q_table, starts, key_starts,
    rows, keys, segments, heads, q_stride, k_stride, v_stride,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ROTATE: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, HELD: tl.constexpr, STREAMED: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of queries of one head, over all keys of its segment."""
    segment, first, stop = find_tile(starts, segments, rows, HELD)
    if first >= stop:
        return
    head_index = tl.program_id(1)
    column = head_index.to(tl.int64) * D
    own = first + tl.arange(0, HELD)
    inside = own < stop
    q_head, q_tail = load_head(q + column, own, inside, q_stride * 8, HEAD, TAIL, D)
    g_head, g_tail = load_head(grad + column, own, inside, heads * D, HEAD, TAIL, D)
    row_sums = head_index.to(tl.int64) * rows
    log_sum = tl.load(lse + row_sums + own, mask=inside, other=float("inf"))
    taken = tl.load(delta + row_sums + own, mask=inside, other=0.0)
    dq_head = tl.zeros((HELD, HEAD), tl.float32)
    dq_tail = dq_head
    if TAIL > 0:
        dq_tail = tl.zeros((HELD, TAIL), tl.float32)
    key_stop = load_start(key_starts, segment + 1, keys)
    for key in range(load_start(key_starts, segment, keys), key_stop, STREAMED):
        other = key + tl.arange(0, STREAMED)
        there = other < key_stop
        k_head, k_tail = load_head(k + column, other, there, k_stride * 8, HEAD, TAIL, D)
        v_head, v_tail = load_head(v + column, other, there, v_stride * 8, HEAD, TAIL, D)
        scores, slope = capped(products(q_head, q_tail, k_head, k_tail, TAIL, PRECISION), SCALE, SOFTCAP)
        scores = tl.where(there[None, :], scores * LOG2E, MASKED)
        weights = tl.exp2(scores - log_sum[:, None])
        d_weights = products(g_head, g_tail, v_head, v_tail, TAIL, PRECISION)
        d_scores = (weights * (d_weights - taken[:, None]) * slope).to(k.dtype.element_ty)
        dq_head = tl.dot(d_scores, k_head, dq_head, input_precision=PRECISION)
        if TAIL > 0:
            dq_tail = tl.dot(d_scores, k_tail, dq_tail, input_precision=PRECISION)
    dq_head, dq_tail = dq_head * SCALE, dq_tail * SCALE
    if ROTATE:
        dq_head, dq_tail = rotate_head(dq_head, dq_tail, q_table, own, inside, -1.0, HEAD, TAIL, D)
    store_head(dq + column, own, inside, heads * D, dq_head, dq_tail, HEAD, TAIL, D)
