# SPDX-License-Identifier: Apache-2.0
"""Kernel of the walk: for each refresh slot the boundaries of the top-k and the pool, tau, |F|, and the stored lists.

No slot depends on another. The pool of a slot is the best `pool` of two sorted lists: X (the best keys before the
block that the slot reaches into) and those keys of that block Y that have been offered already. For a key of Y

    rank in the union = (offered keys of Y up to it, a prefix sum) + (keys of X above it, a binary search done once)

so the number of keys of Y in the top-k tells which key of X closes the top-k, and likewise for the pool. tau is then
solved over both lists by active-set steps inside a bracket, exactly (see `threshold.py`), started at the previous
slot's tau; the result does not depend on the start. Y lives in registers. X stays in memory: a count or a sum over its
keys above some score is a search in its CHUNKS first keys of chunks, then in one chunk of WIDTH keys.
A slot that offers nothing better than the worst key of the pool repeats the slot before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import EMPTY, count_above, find_sequence, key_index, key_score, round_to_grid

ONE = tl.constexpr(274877906944.0)  # 1 in units of the grid
LIMIT = tl.constexpr(4611686018427387904.0)  # 2^62


@triton.jit
def _integer(z):
    """Grid units as int64. Scores beyond 2^24 saturate: there F holds nothing but ties of z_(k), whose sum cancels."""
    return tl.minimum(tl.maximum(z, -LIMIT), LIMIT).to(tl.int64)


@triton.jit
def _boundary(x_ptr, y_ptr, packed, rank, has_x):
    """Key of 1-based `rank` in the union, given 65536 count + lane of the last key of Y within it; also that count."""
    count = tl.where(packed < 0, 0, packed >> 16)
    last_y = tl.load(y_ptr + (packed & 0xFFFF), mask=packed >= 0, other=-EMPTY - 1)
    x_rank = rank - count
    last_x = tl.load(x_ptr + x_rank - 1, mask=has_x & (x_rank > 0), other=EMPTY)
    last_x = tl.where(x_rank > 0, last_x, -EMPTY - 1)
    return tl.minimum(last_x, last_y), count


@triton.jit
def _above(
    x_ptr, ends, sums, origin, origin_integer, bound, limit, has_x, CHUNKS: tl.constexpr, WIDTH: tl.constexpr
):
    """Count and sum of z - origin over the first `limit` keys of X with z - origin > bound (grid units).

    ends [CHUNKS] last z of each chunk; sums [CHUNKS] int64 sum of all chunks up to it.
    """
    chunk = tl.arange(0, CHUNKS)
    full = tl.sum(((ends - origin > bound) & (chunk * WIDTH + WIDTH <= limit)).to(tl.int32), 0)
    lane = full * WIDTH + tl.arange(0, WIDTH)
    z = round_to_grid(key_score(tl.load(x_ptr + lane, mask=has_x & (lane < CHUNKS * WIDTH), other=EMPTY)))
    inside = (z - origin > bound) & (lane < limit)
    count = full * WIDTH + tl.sum(inside.to(tl.int32), 0)
    total = tl.sum(tl.where(inside, _integer(z), 0), 0) + tl.sum(tl.where(chunk == full - 1, sums, 0), 0)
    return count, total - count * origin_integer


@triton.jit
def _fractional_x(x_ptr, end_scores, tau, limit, has_x, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """#{0 < u - tau < 1} over the first `limit` keys of X."""
    chunk_end = tl.arange(0, CHUNKS) * WIDTH + WIDTH
    distance = end_scores.to(tl.float64) - tau
    positive = tl.sum(((distance > 0.0) & (chunk_end <= limit)).to(tl.int32), 0)
    saturated = tl.sum(((distance >= 1.0) & (chunk_end <= limit)).to(tl.int32), 0)
    lane = positive * WIDTH + tl.arange(0, WIDTH)
    key = tl.load(x_ptr + lane, mask=has_x & (lane < CHUNKS * WIDTH), other=EMPTY)
    more = (key_score(key).to(tl.float64) - tau > 0.0) & (lane < limit)
    positive = positive * WIDTH + tl.sum(more.to(tl.int32), 0)
    lane = saturated * WIDTH + tl.arange(0, WIDTH)
    key = tl.load(x_ptr + lane, mask=has_x & (lane < CHUNKS * WIDTH), other=EMPTY)
    more = (key_score(key).to(tl.float64) - tau >= 1.0) & (lane < limit)
    return positive - (saturated * WIDTH + tl.sum(more.to(tl.int32), 0))


@triton.jit
def _solve(
    x_ptr, ends, sums, d_y, kth, topk, pool_x, start, has_x, CHUNKS: tl.constexpr, WIDTH: tl.constexpr
):
    """tau - z_(k) in grid units, rounded down; F not empty. d_y: z - z_(k) of Y's keys in the pool, or -inf."""
    lo = kth * 0.0 - ONE
    hi = kth * 0.0
    point = tl.where((start > lo) & (start < hi), start, 0.5 * lo)
    numerator = hi
    size = hi + 1.0
    kth_integer = _integer(kth)
    last_high = tl.zeros([], tl.int32) - 1
    last_low = tl.zeros([], tl.int32) - 1
    step_number = 0
    while step_number < 256:
        low_x, sum_low = _above(x_ptr, ends, sums, kth, kth_integer, point, pool_x, has_x, CHUNKS, WIDTH)
        # z - 1 >= tau for integers z, as a strict comparison
        bound = tl.ceil(point) + ONE - 1.0
        high_x, sum_high = _above(x_ptr, ends, sums, kth, kth_integer, bound, pool_x, has_x, CHUNKS, WIDTH)
        positive = d_y > point
        saturated = d_y > bound
        low = low_x + tl.sum(positive.to(tl.int32), 0)
        high = high_x + tl.sum(saturated.to(tl.int32), 0)
        if (low == last_low) & (high == last_high):
            step_number = 256
        else:
            size = (low - high).to(tl.float64)
            total = (sum_low - sum_high).to(tl.float64)
            total += tl.sum(tl.where(positive & (saturated == 0), d_y, 0.0), 0)
            numerator = total + (high - topk).to(tl.float64) * ONE
            higher = numerator > point * size
            lo = tl.where(higher, tl.maximum(lo, point), lo)
            hi = tl.where(higher, hi, tl.minimum(hi, point))
            step = numerator / tl.maximum(size, 1.0)
            good = (size > 0.0) & (step >= lo) & (step <= hi)
            good = good & ((step_number < 8) | (step_number % 2 == 0))
            point = tl.where(good, step, 0.5 * (lo + hi))
            last_low = tl.where(good, low, -1)
            last_high = tl.where(good, high, -1)
            step_number += 1
    return tl.floor(numerator / size)


@triton.jit(
    do_not_specialize=[
        "num_seqs",
        "num_slots",
        "num_tiles",
        "candidate_base",
        "candidates",
        "first_candidate",
        "first_refresh",
        "topk",
        "pool",
        "window",
        "stride",
        "tile_slots",
        "slots",
        "lead",
    ]
)
def walk(
    y_ptr,
    x_ptr,
    best_ptr,
    worst_ptr,
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
    slots,
    lead,
    LOG_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOPK: tl.constexpr,
    PACKED: tl.constexpr,
    STATE: tl.constexpr,
    HARD: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """Grid (pieces of `slots` consecutive slots, rows). A program writes the slots of its piece and no other. The first
    piece is `lead` slots short, so that pieces and blocks begin at the same slots where the sizes allow it."""
    SIZE: tl.constexpr = 1 << LOG_SIZE
    CHUNKS: tl.constexpr = 1 << (LOG_SIZE // 2)
    WIDTH: tl.constexpr = SIZE // CHUNKS
    PART: tl.constexpr = 8 if WIDTH > 8 else WIDTH
    row = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * slots - lead
    stop = tl.minimum(slot + slots, num_slots)
    slot = tl.maximum(slot, 0)
    y_ptr += row * y_stride
    x_ptr += row * x_stride
    out = row * num_slots
    lists_ptr += row * num_tiles * topk
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
            keys_y = tl.load(y + lane_y, mask=block * BLOCK + lane_y < count, other=EMPTY)
            score_y = key_score(keys_y)
            z_y = round_to_grid(score_y)
            order = tl.where(keys_y == EMPTY, BLOCK, key_index(keys_y) - base - block * BLOCK)
            above = lane_y * 0  # keys of X above each key of Y
            chunk_ends = tl.arange(0, CHUNKS) * WIDTH + WIDTH - 1
            end_scores = key_score(tl.load(x + chunk_ends, mask=has_x & (chunk_ends >= 0), other=EMPTY))
            ends = round_to_grid(end_scores)
            sums = tl.zeros([CHUNKS], tl.int64)
            if has_x:
                above = count_above(x, keys_y, LOG_SIZE, False)
                if not HARD:
                    part = tl.arange(0, CHUNKS)[:, None] * WIDTH + tl.arange(0, PART)[None, :]
                    for first in range(0, WIDTH, PART):
                        sums += tl.sum(_integer(round_to_grid(key_score(tl.load(x + first + part)))), 1)
                    sums = tl.cumsum(sums, 0)
            best = tl.full([], EMPTY, tl.int64)
            worst = tl.full([], EMPTY, tl.int64)
            tau = tl.full([], float("-inf"), tl.float64)
            high = tau.to(tl.float32)
            low = high * 0.0
            fractional = block * 0
            before = block * 0 - 1
            for r in range(slot, segment):
                local = r - first_slot
                refresh = first_refresh + local
                offered = refresh * stride - window + 1 - first_candidate - block * BLOCK
                seen = order < offered
                entered = tl.max((seen & (order >= before) & (keys_y > worst)).to(tl.int32), 0)
                starts_tile = (refresh % tile_slots == 0) | (local == 0)
                rank = above
                if (entered > 0) | (before < 0) | starts_tile:
                    count_y = tl.cumsum(seen.to(tl.int32), 0)
                    rank = tl.where(seen, count_y + above, SIZE + BLOCK + 1)
                if (entered > 0) | (before < 0):
                    count_y = rank - above
                    entry = count_y * 65536 + lane_y
                    in_k = tl.max(tl.where(rank <= topk, entry, -1), 0)
                    in_pool = tl.max(tl.where(rank <= pool, entry, -1), 0)
                    best, _best_y = _boundary(x, y, in_k, topk, has_x)
                    worst, pool_y = _boundary(x, y, in_pool, pool, has_x)
                    tau = tl.full([], float("-inf"), tl.float64)
                    if not HARD:
                        in_next = tl.max(tl.where(rank <= topk + 1, entry, -1), 0)
                        following, _next_y = _boundary(x, y, in_next, topk + 1, has_x)
                        if following != EMPTY:
                            kth = round_to_grid(key_score(best))
                            gap = round_to_grid(key_score(following)) - kth
                            if gap <= -ONE:
                                tau = kth + tl.floor((gap - ONE) * 0.5)
                            else:
                                d_y = tl.where(rank <= pool, z_y - kth, float("-inf"))
                                start = previous - kth
                                tau = kth + _solve(
                                    x, ends, sums, d_y, kth, topk, pool - pool_y, start, has_x, CHUNKS, WIDTH
                                )
                            previous = tau
                            tau = tau * 3.637978807091713e-12
                    high = tau.to(tl.float32)
                    low = tl.where(high == float("-inf"), 0.0, (tau - high.to(tl.float64)).to(tl.float32))
                    tau = high.to(tl.float64) + low.to(tl.float64)
                    distance = score_y.to(tl.float64) - tau
                    fractional = tl.sum(
                        ((rank <= pool) & (distance > 0.0) & (distance < 1.0)).to(tl.int32), 0
                    )
                    fractional += _fractional_x(x, end_scores, tau, pool - pool_y, has_x, CHUNKS, WIDTH)
                before = tl.maximum(offered, 0)
                tl.store(best_ptr + out + r, key_index(best) if INDEXED else best)
                tl.store(worst_ptr + out + r, key_index(worst) if INDEXED else worst)
                tl.store(high_ptr + out + r, high)
                tl.store(low_ptr + out + r, low)
                tl.store(size_ptr + out + r, fractional)
                if starts_tile:
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
