# SPDX-License-Identifier: Apache-2.0
"""Kernel of the walk: for each refresh slot the boundaries of the top-k and the pool, tau, |F|, and the stored lists.

No slot depends on another. The pool of a slot is the best `pool` of two sorted lists: X (the best keys before the
block that the slot reaches into) and those keys of that block Y that have been offered already. For a key of Y

    rank in the union = (offered keys of Y up to it, a prefix sum) + (keys of X above it, a binary search done once)

so the number of keys of Y in the top-k tells which key of X closes the top-k, and likewise for the pool. tau is then
solved over both lists by active-set steps inside a bracket, exactly (see `threshold.py`), started at the previous
slot's tau; the result does not depend on the start.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import EMPTY, find_sequence, key_index, key_score, round_to_grid


@triton.jit
def _max3(a0, b0, c0, a1, b1, c1):
    return tl.maximum(a0, a1), tl.maximum(b0, b1), tl.maximum(c0, c1)


@triton.jit
def _add2(a0, b0, a1, b1):
    return a0 + a1, b0 + b1


@triton.jit
def _boundary(x_ptr, y_ptr, packed, rank, HAS_X):
    """Key of 1-based `rank` in the union, given the last key of Y within that rank; also the count of Y within it."""
    count = tl.where(packed < 0, 0, packed >> 16)
    last_y = tl.load(y_ptr + (packed & 0xFFFF), mask=packed >= 0, other=-EMPTY - 1)
    x_rank = rank - count
    last_x = tl.load(x_ptr + x_rank - 1, mask=HAS_X & (x_rank > 0), other=EMPTY)
    last_x = tl.where(x_rank > 0, last_x, -EMPTY - 1)
    return tl.minimum(last_x, last_y), count


@triton.jit
def _active_set(d, tau, ONE: tl.constexpr):
    """(count of z - tau >= 1) + 65536 |F|, and the sum over F, for scores d relative to z_(k); -inf where absent."""
    positive = d > tau
    saturated = d - ONE >= tau
    count = tl.where(positive, tl.where(saturated, 1, 65536), 0)
    return tl.reduce((count, tl.where(positive & (saturated == 0), d, 0.0)), 0, _add2)


@triton.jit
def _fractional(score, tau, inside):
    distance = score.to(tl.float64) - tau
    return tl.sum((inside & (distance > 0.0) & (distance < 1.0)).to(tl.int32), 0)


@triton.jit
def walk(
    y_ptr,
    x_ptr,
    best_ptr,
    worst_ptr,
    tau_ptr,
    high_ptr,
    low_ptr,
    size_ptr,
    lists_ptr,
    cu_ptr,
    slot_ptr,
    tile_ptr,
    xlist_ptr,
    num_seqs,
    num_slots,
    num_tiles,
    candidate_base,
    candidates,
    first_candidate,
    first_refresh,
    topk,
    pool,
    window,
    stride,
    tile_slots,
    y_stride,
    x_stride,
    SLOTS: tl.constexpr,
    SIZE: tl.constexpr,
    LOG_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOPK: tl.constexpr,
    PACKED: tl.constexpr,
    STATE: tl.constexpr,
    HARD: tl.constexpr,
):
    """Grid (pieces of SLOTS consecutive slots, rows). A program writes the slots of its piece and no other."""
    ONE: tl.constexpr = 274877906944.0
    row = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * SLOTS
    stop = tl.minimum(slot + SLOTS, num_slots)
    y_ptr += row * y_stride
    x_ptr += row * x_stride
    out = row * num_slots
    lists_ptr += row * num_tiles * topk
    lane_x = tl.arange(0, SIZE)
    lane_y = tl.arange(0, BLOCK)
    lane_k = tl.arange(0, TOPK)
    first_slot = slot * 0
    first_list = slot * 0
    tile_base = slot * 0
    base = slot * 0 + candidate_base
    count = slot * 0 + candidates
    previous = tl.full([], -1.0, tl.float64)

    while slot < stop:
        segment = stop
        used = True
        if PACKED:
            a = find_sequence(slot_ptr, num_seqs, slot)
            used = a < num_seqs
            if used:
                first_slot = tl.load(slot_ptr + a)
                first_list = tl.load(xlist_ptr + a)
                tile_base = tl.load(tile_ptr + a)
                base = tl.load(cu_ptr + a)
                length = tl.load(cu_ptr + a + 1) - base
                count = tl.maximum((length - 1) // stride * stride - window + 1, 0)
                segment = tl.minimum(stop, tl.load(slot_ptr + a + 1))
        if used:
            offered = (first_refresh + slot - first_slot) * stride - window + 1 - first_candidate
            block = tl.maximum((offered + BLOCK - 1) // BLOCK - 1, 0)
            until = ((block + 1) * BLOCK + window - 1 + first_candidate) // stride - first_refresh + 1
            segment = tl.minimum(segment, first_slot + until)
            has_x = block + STATE > 0
            x = x_ptr + (first_list + block - 1 + STATE).to(tl.int64) * SIZE
            y = y_ptr + block * BLOCK
            if PACKED:
                y += base
            keys_x = tl.load(x + lane_x, mask=has_x & (lane_x >= 0), other=EMPTY)
            keys_y = tl.load(y + lane_y, mask=block * BLOCK + lane_y < count, other=EMPTY)
            score_x = key_score(keys_x)
            score_y = key_score(keys_y)
            z_x = round_to_grid(score_x)
            z_y = round_to_grid(score_y)
            order = tl.where(keys_y == EMPTY, BLOCK, key_index(keys_y) - base - block * BLOCK)
            above = lane_y * 0  # keys of X above each key of Y
            if has_x:
                end = above + SIZE
                for _ in range(LOG_SIZE + 1):
                    middle = (above + end) // 2
                    open_ = above < end
                    greater = tl.load(x + middle, mask=open_, other=EMPTY) > keys_y
                    end = tl.where(open_ & (greater == 0), middle, end)
                    above = tl.where(open_ & greater, middle + 1, above)
            for r in range(slot, segment):
                local = r - first_slot
                offered = (first_refresh + local) * stride - window + 1 - first_candidate
                seen = order < offered - block * BLOCK
                count_y = tl.cumsum(seen.to(tl.int32), 0)
                rank = tl.where(seen, count_y + above, SIZE + BLOCK + 1)
                entry = count_y * 65536 + lane_y
                in_k, in_next, in_pool = tl.reduce(
                    (
                        tl.where(rank <= topk, entry, -1),
                        tl.where(rank <= topk + 1, entry, -1),
                        tl.where(rank <= pool, entry, -1),
                    ),
                    0,
                    _max3,
                )
                best, best_y = _boundary(x, y, in_k, topk, has_x)
                worst, pool_y = _boundary(x, y, in_pool, pool, has_x)
                tl.store(best_ptr + out + r, best)
                tl.store(worst_ptr + out + r, worst)
                inside_x = lane_x < pool - pool_y
                inside_y = rank <= pool
                tau = tl.full([], float("-inf"), tl.float64)
                if not HARD:
                    following, _unused = _boundary(x, y, in_next, topk + 1, has_x)
                    if following != EMPTY:
                        kth = round_to_grid(key_score(best))
                        gap = round_to_grid(key_score(following)) - kth
                        if gap <= -ONE:
                            tau = kth + tl.floor((gap - ONE) * 0.5)
                        else:
                            d_x = tl.where(inside_x, z_x - kth, float("-inf"))
                            d_y = tl.where(inside_y, z_y - kth, float("-inf"))
                            lo = kth * 0.0 - ONE
                            hi = kth * 0.0
                            point = previous - kth
                            point = tl.where((point > lo) & (point < hi), point, 0.5 * lo)
                            numerator = hi
                            size = hi + 1.0
                            last = -1
                            step_number = 0
                            while step_number < 256:
                                many_x, total_x = _active_set(d_x, point, ONE)
                                many_y, total_y = _active_set(d_y, point, ONE)
                                many = many_x + many_y
                                if many == last:
                                    step_number = 256
                                else:
                                    size = (many >> 16).to(tl.float64)
                                    numerator = (total_x + total_y) + ((many & 0xFFFF) - topk).to(tl.float64) * ONE
                                    higher = numerator > point * size
                                    lo = tl.where(higher, tl.maximum(lo, point), lo)
                                    hi = tl.where(higher, hi, tl.minimum(hi, point))
                                    step = numerator / tl.maximum(size, 1.0)
                                    good = (size > 0.0) & (step >= lo) & (step <= hi)
                                    good = good & ((step_number < 8) | (step_number % 2 == 0))
                                    point = tl.where(good, step, 0.5 * (lo + hi))
                                    last = tl.where(good, many, -1)
                                    step_number += 1
                            tau = kth + tl.floor(numerator / size)
                        previous = tau
                        tau = tau * 3.637978807091713e-12
                high = tau.to(tl.float32)
                low = tl.where(high == float("-inf"), 0.0, (tau - high.to(tl.float64)).to(tl.float32))
                tau = high.to(tl.float64) + low.to(tl.float64)
                tl.store(tau_ptr + out + r, tau)
                tl.store(high_ptr + out + r, high)
                tl.store(low_ptr + out + r, low)
                tl.store(size_ptr + out + r, _fractional(score_x, tau, inside_x) + _fractional(score_y, tau, inside_y))
                refresh = first_refresh + local
                if (refresh % tile_slots == 0) | (local == 0):
                    # Keys of Y go to their rank; the keys of X fill the places left, in order.
                    tile = tile_base + refresh // tile_slots - first_refresh // tile_slots
                    target = lists_ptr + tile.to(tl.int64) * topk
                    tl.store(target + lane_k, lane_k * 0 - 1, mask=lane_k < topk)
                    tl.debug_barrier()
                    tl.store(target + rank - 1, key_index(keys_y), mask=rank <= topk)
                    tl.debug_barrier()
                    chosen = tl.load(target + lane_k, mask=lane_k < topk, other=0)
                    source = lane_k - tl.cumsum((chosen >= 0).to(tl.int32), 0)
                    fill = (lane_k < topk) & (chosen < 0) & has_x
                    key = tl.load(x + source, mask=fill, other=EMPTY)
                    tl.store(target + lane_k, key_index(key), mask=fill & (key != EMPTY))
        else:
            for r in range(slot, segment):
                tl.store(high_ptr + out + r, float("inf"))
                tl.store(low_ptr + out + r, 0.0)
                tl.store(size_ptr + out + r, 0)
        slot = segment
