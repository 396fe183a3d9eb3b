# SPDX-License-Identifier: Apache-2.0
"""Kernel of the intervals: for each key the first query it leaves, and the slots at which its gate is fractional.

The boundaries of top-k and pool and the threshold never fall from one slot to the next, so each answer is one binary
search over the slots of the key's sequence, from the slot at which the key enters the pool.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import EMPTY, LOW, make_keys


@triton.jit
def _bound(bound_ptr, slot, mask, scores, stride, INDEXED: tl.constexpr):
    """Boundary keys of slots, stored as keys or (INDEXED) as indices of keys, LOW where there is none."""
    if INDEXED:
        index = tl.load(bound_ptr + slot, mask=mask, other=LOW)
        score = tl.load(scores + index.to(tl.int64) * stride, mask=mask & (index != LOW), other=float("-inf"))
        return make_keys(score, index)
    else:
        return tl.load(bound_ptr + slot, mask=mask, other=EMPTY)


@triton.jit
def _threshold(high_ptr, low_ptr, slot, mask):
    """tau of slots in float64, exactly as stored."""
    high = tl.load(high_ptr + slot, mask=mask, other=0.0).to(tl.float64)
    return high + tl.load(low_ptr + slot, mask=mask, other=0.0).to(tl.float64)


@triton.jit(
    do_not_specialize=[
        "num_seqs",
        "num_slots",
        "pool",
        "token_base",
        "candidate_base",
        "past",
        "length",
        "first_refresh",
        "heads",
        "window",
        "stride",
        "steps",
    ]
)
def intervals(
    score_ptr,
    best_ptr,
    worst_ptr,
    high_ptr,
    low_ptr,
    evict_ptr,
    start_ptr,
    end_ptr,
    cu_ptr,
    slot_ptr,
    num_seqs,
    num_keys,
    num_slots,
    pool,
    token_base,
    candidate_base,
    past,
    length,
    first_refresh,
    heads,
    window,
    stride,
    steps,
    score_stride_b,
    score_stride_s,
    score_stride_h,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    STATE: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """Grid (blocks of BLOCK keys, rows). Writes evict, fraction_start and fraction_end [rows, num_keys]. INDEXED as in
    `walk`."""
    row = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = j < num_keys
    live = inside
    first_token = j * 0  # of the key's sequence, as a query index
    first_slot = j * 0
    stop = j * 0 + num_slots
    last_token = j * 0 + length
    position = j - token_base + past
    if PACKED:
        a = tl.zeros([BLOCK], tl.int32)
        top = a + num_seqs
        for _ in range(steps):
            middle = (a + top) // 2
            open_ = a < top
            owns = tl.load(cu_ptr + 1 + middle, mask=open_, other=0) <= j
            a = tl.where(open_ & owns, middle + 1, a)
            top = tl.where(open_ & (owns == 0), middle, top)
        live = inside & (a < num_seqs)
        first_token = tl.load(cu_ptr + a, mask=live, other=0)
        last_token = tl.load(cu_ptr + a + 1, mask=live, other=0)
        first_slot = tl.load(slot_ptr + a, mask=live, other=0)
        stop = tl.load(slot_ptr + a + 1, mask=live, other=0)
        position = j - first_token
    arrival = tl.maximum((position + window + stride - 1) // stride - first_refresh, 0)
    if STATE:
        arrival = tl.where(j < pool, 0, arrival)
    scores = score_ptr + (row // heads) * score_stride_b + (row % heads) * score_stride_h
    score = tl.load(scores + j.to(tl.int64) * score_stride_s, mask=live, other=float("-inf"))
    if STATE:
        live = live & ((j < pool) | (j >= candidate_base)) & (score != float("-inf"))
    key = make_keys(score, j)
    u = score.to(tl.float64)
    best_ptr += row * num_slots
    worst_ptr += row * num_slots
    high_ptr += row * num_slots
    low_ptr += row * num_slots

    # A key that the pool has no place for when it arrives is neither selected nor in F. For the others, F begins no
    # later than the selection ends, and ends no earlier: saturated keys are selected, and selected gates are not zero.
    leave = tl.minimum(first_slot + arrival, stop)
    held = live & (leave < stop)
    held = held & (_bound(worst_ptr, leave, held, scores, score_stride_s, INDEXED) <= key)
    leave_stop = tl.where(held, stop, leave)
    start = leave
    steps_left = tl.max(leave_stop - leave, 0)
    while steps_left > 0:
        open_ = leave < leave_stop
        middle = (leave + leave_stop) // 2
        holds = _bound(best_ptr, middle, open_, scores, score_stride_s, INDEXED) > key
        leave_stop = tl.where(open_ & holds, middle, leave_stop)
        leave = tl.where(open_ & (holds == 0), middle + 1, leave)
        steps_left = steps_left >> 1

    start_stop = leave
    steps_left = tl.max(start_stop - start, 0)
    while steps_left > 0:
        open_ = start < start_stop
        middle = (start + start_stop) // 2
        holds = u - _threshold(high_ptr, low_ptr, middle, open_) < 1.0
        start_stop = tl.where(open_ & holds, middle, start_stop)
        start = tl.where(open_ & (holds == 0), middle + 1, start)
        steps_left = steps_left >> 1

    end = leave
    end_stop = tl.where(held, stop, leave)
    steps_left = tl.max(end_stop - end, 0)
    while steps_left > 0:
        open_ = end < end_stop
        middle = (end + end_stop) // 2
        holds = u - _threshold(high_ptr, low_ptr, middle, open_) <= 0.0
        holds = holds | (_bound(worst_ptr, middle, open_, scores, score_stride_s, INDEXED) > key)
        end_stop = tl.where(open_ & holds, middle, end_stop)
        end = tl.where(open_ & (holds == 0), middle + 1, end)
        steps_left = steps_left >> 1
    evict = first_token + (leave - first_slot + first_refresh) * stride - past
    evict = tl.minimum(tl.maximum(evict, 0), last_token)
    out = row * num_keys + j
    tl.store(evict_ptr + out, tl.where(live, evict, 0), mask=inside)
    tl.store(start_ptr + out, tl.where(live, start, 0), mask=inside)
    tl.store(end_ptr + out, tl.where(live, end, 0), mask=inside)
