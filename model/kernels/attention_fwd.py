"""Attention inside each segment, forward: a block holds a tile of queries and streams the keys of its segment.

Softmax on the fly, in base 2. Tiles are counted from the start of the segment, one block owns its rows from the first
key to the last, and no setting depends on the batch: an item's bits are the same whatever shares its pack.
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
    load_prepared,
    load_start,
    products,
    store_head,
)

_NOT_SPECIALIZED = ["rows", "keys", "segments", "heads", "q_stride", "k_stride", "v_stride"]


@triton.jit
def absorb(
    q_head, q_tail, k_head, k_tail, v_head, v_tail, there, largest, total, acc_head, acc_tail,
    ALL: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax: some more keys and values, of which `there` says which exist (ALL: all do)."""
    scores, _ = capped(products(q_head, q_tail, k_head, k_tail, TAIL, PRECISION), SCALE, SOFTCAP)
    scores = scores * LOG2E
    if not ALL:
        scores = tl.where(there[None, :], scores, MASKED)
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.exp2(scores - new_largest[:, None])
    keep = tl.exp2(largest - new_largest)
    total = total * keep + tl.sum(weights, 1)
    weights = weights.to(v_head.dtype)
    acc_head = tl.dot(weights, v_head, acc_head * keep[:, None], input_precision=PRECISION)
    if TAIL > 0:
        acc_tail = tl.dot(weights, v_tail, acc_tail * keep[:, None], input_precision=PRECISION)
    return new_largest, total, acc_head, acc_tail


@triton.jit
def load_copied(blocks_head, blocks_tail, first, head_index, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Rows of one head, all of which exist, by the copy engine of sm_90 and later; columns beyond D come as zero."""
    head = blocks_head.load([first, head_index, 0])
    head = tl.reshape(head, (head.shape[0], HEAD))
    tail = head
    if TAIL > 0:
        tail = blocks_tail.load([first, head_index, HEAD])
        tail = tl.reshape(tail, (tail.shape[0], TAIL))
    return head, tail


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def forward_kernel(
    q, k, v, k_blocks_head, k_blocks_tail, v_blocks_head, v_blocks_tail,
    out, lse, q_table, k_table, q_gain, k_gain, starts, key_starts,
    rows, keys, segments, heads, q_stride, k_stride, v_stride,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, NORM_Q: tl.constexpr, ROTATE_Q: tl.constexpr,
    NORM_K: tl.constexpr, ROTATE_K: tl.constexpr, COPIES: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, HELD: tl.constexpr, STREAMED: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. Strides are in units of 8 elements, so that loads are known to be aligned."""
    segment, first, stop = find_tile(starts, segments, rows, HELD)
    if first >= stop:
        return
    head_index = tl.program_id(1)
    column = head_index.to(tl.int64) * D
    own = first + tl.arange(0, HELD)
    inside = own < stop
    q_head, q_tail = load_prepared(
        q + column, q_table, q_gain, head_index, own, inside, q_stride * 8, NORM_Q, ROTATE_Q, HEAD, TAIL, D
    )
    largest = tl.full((HELD,), MASKED, tl.float32)
    total = tl.zeros((HELD,), tl.float32)
    acc_head = tl.zeros((HELD, HEAD), tl.float32)
    acc_tail = acc_head
    if TAIL > 0:
        acc_tail = tl.zeros((HELD, TAIL), tl.float32)
    key_first = load_start(key_starts, segment, keys)
    key_stop = tl.maximum(load_start(key_starts, segment + 1, keys), key_first)
    if COPIES:
        # Whole tiles only: a copy that reached beyond the segment would bring the neighbour's rows.
        whole = key_first + (key_stop - key_first) // STREAMED * STREAMED
        for key in range(key_first, whole, STREAMED):
            k_head, k_tail = load_copied(k_blocks_head, k_blocks_tail, key, head_index, HEAD, TAIL)
            v_head, v_tail = load_copied(v_blocks_head, v_blocks_tail, key, head_index, HEAD, TAIL)
            largest, total, acc_head, acc_tail = absorb(
                q_head, q_tail, k_head, k_tail, v_head, v_tail, inside, largest, total, acc_head, acc_tail,
                True, SCALE, SOFTCAP, TAIL, PRECISION,
            )  # fmt: skip
        key_first = whole
    for key in tl.range(key_first, key_stop, STREAMED, num_stages=1 if COPIES else None):
        other = key + tl.arange(0, STREAMED)
        there = other < key_stop
        k_head, k_tail = load_prepared(
            k + column, k_table, k_gain, head_index, other, there, k_stride * 8, NORM_K, ROTATE_K, HEAD, TAIL, D
        )
        v_head, v_tail = load_head(v + column, other, there, v_stride * 8, HEAD, TAIL, D)
        largest, total, acc_head, acc_tail = absorb(
            q_head, q_tail, k_head, k_tail, v_head, v_tail, there, largest, total, acc_head, acc_tail,
            False, SCALE, SOFTCAP, TAIL, PRECISION,
        )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # a segment of queries without keys gives zeros
    store_head(
        out + column, own, inside, heads * D, acc_head / total[:, None], acc_tail / total[:, None], HEAD, TAIL, D
    )
    tl.store(lse + head_index.to(tl.int64) * rows + own, largest + tl.log2(total), mask=inside)
