# SPDX-License-Identifier: Apache-2.0
"""Kernel of the walk: for each refresh slot the boundaries of the top-k and the pool, tau, |F|, and the stored lists.

No slot depends on another. The pool of a slot is the best `pool` of two sorted lists: X (the best keys before the
block that the slot reaches into) and those keys of that block Y that have been offered already. For a key of Y

    rank in the union = (offered keys of Y up to it, a prefix sum) + (keys of X above it, found by `prepare_blocks`)

so the last key of Y in the top-k tells which key of X closes the top-k, and likewise for the pool. Only the first
`useful` keys of Y can be in a pool: where most tokens are too late to matter, a slot reads few of them.
A slot that offers nothing better than the worst key of the pool repeats the slot before.
"""

import triton
import triton.language as tl

from .keys import EMPTY, LOW, NEVER, find_sequence, key_index, key_score, round_to_grid
from .threshold_kernel import ONE, count_fractional, solve, word_order


@triton.jit
def _boundary(x_ptr, y_ptr, entry, rank, origin, has_x):
    """Key of 1-based `rank` in the union, given 65536 count + place of the last key of Y within it; also that count,
    and the end of those keys in Y."""
    count = tl.where(entry < 0, 0, entry >> 16)
    reach = tl.where(entry < 0, 0, (entry & 0xFFFF) + 1)
    word = tl.load(y_ptr + reach - 1, mask=reach > 0, other=NEVER)
    key = (word >> 32 << 32) | ((origin + word_order(word)) ^ LOW).to(tl.int64)
    last_y = tl.where(reach > 0, key, -EMPTY - 1)
    x_rank = rank - count
    last_x = tl.load(x_ptr + x_rank - 1, mask=has_x & (x_rank > 0), other=EMPTY)
    last_x = tl.where(x_rank > 0, last_x, -EMPTY - 1)
    return tl.minimum(last_x, last_y), count, reach


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
    sums_ptr,
    useful_ptr,
    best_ptr,
    worst_ptr,
    high_ptr,
    low_ptr,
    size_ptr,
    lists_ptr,
    cu_ptr,
    slot_ptr,
    tile_ptr,
    block_ptr,
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
    sums_stride,
    useful_stride,
    slots,
    lead,
    LOG_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    PLACES: tl.constexpr,
    PACKED: tl.constexpr,
    STATE: tl.constexpr,
    HARD: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """Grid (pieces of `slots` consecutive slots, rows). A program writes the slots of its piece and no other. The first
    piece is `lead` slots short, so that pieces and blocks begin at the same slots where the sizes allow it.

    LANES words of Y, and PLACES of a stored list, are handled at a time.
    """
    SIZE: tl.constexpr = 1 << LOG_SIZE
    CHUNKS: tl.constexpr = 1 << (LOG_SIZE // 2)
    WIDTH: tl.constexpr = SIZE // CHUNKS
    row = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * slots - lead
    stop = tl.minimum(slot + slots, num_slots)
    slot = tl.maximum(slot, 0)
    y_ptr += row * y_stride
    x_ptr += row * x_stride
    sums_ptr += row * sums_stride
    useful_ptr += row * useful_stride
    out = row * num_slots
    lists_ptr += row * num_tiles * topk
    first_slot = slot * 0
    first_block = slot * 0
    first_list = slot * 0
    tile_base = slot * 0
    base = slot * 0 + candidate_base
    count = slot * 0 + candidates
    previous = tl.full([], float("-inf"), tl.float64)

    while slot < stop:
        segment = stop
        used = True
        if PACKED:
            a = find_sequence(slot_ptr, num_seqs, slot)
            used = a < num_seqs
            if used:
                first_slot = tl.load(slot_ptr + a)
                first_block = tl.load(block_ptr + a)
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
            place = (first_list + block - 1 + STATE).to(tl.int64)
            x = x_ptr + place * SIZE
            sums = sums_ptr + place * CHUNKS
            y = y_ptr + block * BLOCK
            if PACKED:
                y += base
            origin = base + block * BLOCK
            useful = tl.load(useful_ptr + first_block + block, mask=block * BLOCK < count, other=0)
            chunk_ends = tl.arange(0, CHUNKS) * WIDTH + WIDTH - 1
            end_scores = key_score(tl.load(x + chunk_ends, mask=has_x & (chunk_ends >= 0), other=EMPTY))
            ends = round_to_grid(end_scores)
            worst = tl.full([], EMPTY, tl.int64)
            best = worst
            high = tl.full([], float("-inf"), tl.float32)
            low = high * 0.0
            fractional = block * 0
            before = block * 0 - 1
            for r in range(slot, segment):
                local = r - first_slot
                refresh = first_refresh + local
                offered = refresh * stride - window + 1 - first_candidate - block * BLOCK
                starts_tile = (refresh % tile_slots == 0) | (local == 0)
                tile = tile_base + refresh // tile_slots - first_refresh // tile_slots
                target = lists_ptr + tile.to(tl.int64) * topk
                # A new key that ties with the worst score is taken for one that enters: that costs time only.
                changed = before < 0
                if before >= 0:
                    entering = tl.zeros([LANES], tl.int32)
                    for first in range(0, useful, LANES):
                        lane = first + tl.arange(0, LANES)
                        word = tl.load(y + lane, mask=lane < useful, other=NEVER)
                        order = word_order(word)
                        entering |= ((order < offered) & (order >= before) & (word >> 32 >= worst >> 32)).to(
                            tl.int32
                        )
                    changed = tl.max(entering, 0) > 0
                if changed | starts_tile:
                    if starts_tile:
                        for first in range(0, topk, PLACES):
                            lane = first + tl.arange(0, PLACES)
                            tl.store(target + lane, lane * 0 - 1, mask=lane < topk)
                        tl.debug_barrier()
                    in_k = tl.full([LANES], -1, tl.int32)
                    in_next = tl.full([LANES], -1, tl.int32)
                    in_pool = tl.full([LANES], -1, tl.int32)
                    seen_before = block * 0
                    for first in range(0, useful, LANES):
                        lane = first + tl.arange(0, LANES)
                        word = tl.load(y + lane, mask=lane < useful, other=NEVER)
                        seen = word_order(word) < offered
                        count_y = seen_before + tl.cumsum(seen.to(tl.int32), 0)
                        seen_before += tl.sum(seen.to(tl.int32), 0)
                        rank = tl.where(seen, count_y + (word & 0xFFFF).to(tl.int32), SIZE + BLOCK + 1)
                        entry = count_y * 65536 + lane
                        in_k = tl.maximum(in_k, tl.where(rank <= topk, entry, -1))
                        in_next = tl.maximum(in_next, tl.where(rank <= topk + 1, entry, -1))
                        in_pool = tl.maximum(in_pool, tl.where(rank <= pool, entry, -1))
                        chosen = starts_tile & (rank <= topk)
                        tl.store(target + rank - 1, origin + word_order(word), mask=chosen)
                    if changed:
                        best, _best_y, _best_end = _boundary(x, y, tl.max(in_k, 0), topk, origin, has_x)
                        worst, pool_y, reach = _boundary(x, y, tl.max(in_pool, 0), pool, origin, has_x)
                        limit = tl.where(has_x, pool - pool_y, 0)
                        tau = tl.full([], float("-inf"), tl.float64)
                        if not HARD:
                            following, _y, _end = _boundary(x, y, tl.max(in_next, 0), topk + 1, origin, has_x)
                            if following != EMPTY:
                                kth = round_to_grid(key_score(best))
                                gap = round_to_grid(key_score(following)) - kth
                                if gap <= -ONE:
                                    tau = kth + tl.floor((gap - ONE) * 0.5)
                                else:
                                    tau = kth + solve(
                                        x, y, sums, ends, kth, topk, offered, limit, reach, previous - kth,
                                        CHUNKS, WIDTH, LANES,
                                    )  # fmt: skip
                                previous = tau
                                tau = tau * 3.637978807091713e-12
                        high = tau.to(tl.float32)
                        low = tl.where(high == float("-inf"), 0.0, (tau - high.to(tl.float64)).to(tl.float32))
                        tau = high.to(tl.float64) + low.to(tl.float64)
                        fractional = count_fractional(
                            x, y, end_scores, tau, offered, limit, reach, CHUNKS, WIDTH, LANES
                        )
                before = tl.maximum(offered, 0)
                tl.store(best_ptr + out + r, key_index(best) if INDEXED else best)
                tl.store(worst_ptr + out + r, key_index(worst) if INDEXED else worst)
                tl.store(high_ptr + out + r, high)
                tl.store(low_ptr + out + r, low)
                tl.store(size_ptr + out + r, fractional)
                if starts_tile:
                    # The keys of Y lie at their ranks; the keys of X fill the places left, in order.
                    tl.debug_barrier()
                    filled = block * 0
                    for first in range(0, topk, PLACES):
                        lane = first + tl.arange(0, PLACES)
                        free = (tl.load(target + lane, mask=lane < topk, other=0) < 0).to(tl.int32)
                        source = filled + tl.cumsum(free, 0) - 1
                        filled += tl.sum(free, 0)
                        free_x = (free > 0) & has_x
                        key = tl.load(x + source, mask=free_x, other=EMPTY)
                        tl.store(target + lane, key_index(key), mask=free_x & (key != EMPTY))
        else:
            for r in range(slot, segment):
                tl.store(high_ptr + out + r, float("inf"))
                tl.store(low_ptr + out + r, 0.0)
                tl.store(size_ptr + out + r, 0)
        slot = segment
