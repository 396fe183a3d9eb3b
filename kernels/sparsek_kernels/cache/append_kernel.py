# SPDX-License-Identifier: Apache-2.0
# Triton's language is not typed Python:
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
"""Kernel of the cache's bookkeeping: store one token per row, and refresh the selection where it is due.

A refresh merges the `stride` scores that left the window into the sorted pool by ranks (no sort): an entry of the pool
moves down by the number of newcomers above it, and a newcomer's rank is a binary search in the pool plus its rank among
the newcomers. The keys that leave the selection are its last ranks, and their places go to the newcomers that enter.

One program owns a (row, KV head): no atomics. It decides on the device whether a refresh is due, from the length it
keeps there, so a CUDA graph holds one launch that is right at every step. Replicated threads of several warps read what
others overwrite: barriers stand between the reads and the writes of each stage.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsek_kernels.selection.keys import round_to_grid
from sparsek_kernels.selection.threshold_kernel import ONE, next_point

GRID = tl.constexpr(3.637978807091713e-12)


@triton.jit
def _count_at_least(list_ptr, bound, SIZE: tl.constexpr, LOG_PAD: tl.constexpr):
    """How many of the SIZE descending scores in memory are >= each bound."""
    below = tl.zeros(bound.shape, tl.int32)
    for i in tl.static_range(LOG_PAD):
        last = below + ((1 << (LOG_PAD - 1 - i)) - 1)
        probe = tl.load(list_ptr + last, mask=last < SIZE, other=float("-inf"))
        below = tl.where(probe >= bound, last + 1, below)
    probe = tl.load(list_ptr + below, mask=below < SIZE, other=float("-inf"))
    return below + (probe >= bound).to(tl.int32)


@triton.jit
def _offer(
    key, value, score, pool, place, first, base, worst,
    TOPK: tl.constexpr, RING: tl.constexpr, STRIDE: tl.constexpr, POOL: tl.constexpr, POOL_PAD: tl.constexpr,
    LOG_PAD: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Merge newcomers base ... base + CHUNK - 1 (positions from `first`) into the pool and the selection."""
    entry = tl.arange(0, POOL_PAD)
    z = tl.load(pool + entry, mask=entry < POOL, other=float("-inf"))  # first: the search below then hits L1
    lane = tl.arange(0, CHUNK)
    position = first + base + lane
    ok = (base + lane < STRIDE) & (position >= 0)
    source = TOPK + (position + RING) % RING
    u = tl.load(score + source, mask=ok, other=float("-inf"))
    earlier = (u[None, :] > u[:, None]) | ((u[None, :] == u[:, None]) & (lane[None, :] < lane[:, None]))
    among = tl.sum(earlier.to(tl.int32), 1)
    rank = among + _count_at_least(pool, u, POOL, LOG_PAD)
    enters = ok & (rank < TOPK)
    entering = tl.sum(enters.to(tl.int32), 0)
    given = tl.load(place + TOPK - entering + among, mask=enters, other=0)

    old_place = tl.load(place + entry, mask=entry < TOPK, other=0)
    shift = entry * 0
    for best in range(
        tl.sum((u > worst).to(tl.int32), 0)
    ):  # newcomers above the worst of the pool, best first
        shift += (tl.max(tl.where(among == best, u, float("-inf")), 0) > z).to(tl.int32)
    tl.debug_barrier()
    tl.store(pool + entry + shift, z, mask=entry + shift < POOL)
    tl.store(pool + rank, u, mask=ok & (rank < POOL))
    if entering > 0:
        tl.store(place + entry + shift, old_place, mask=entry < TOPK - entering)
        tl.store(place + rank, given, mask=enters)
        tl.store(score + given, u, mask=enters)
        dim = tl.arange(0, D_PAD)[None, :]
        mask = enters[:, None] & (dim < D)
        moved = tl.load(key + source[:, None] * D + dim, mask=mask, other=0.0)
        tl.store(key + given[:, None] * D + dim, moved, mask=mask)
        moved = tl.load(value + source[:, None] * D + dim, mask=mask, other=0.0)
        tl.store(value + given[:, None] * D + dim, moved, mask=mask)
    tl.debug_barrier()


@triton.jit
def _solve(z, start, TOPK: tl.constexpr):
    """tau - z_(k) in grid units, rounded down; z: scores minus z_(k) in grid units, descending, -inf past the pool.

    Active-set steps inside a bracket, as in `selection.threshold.solve_sorted`; the result does not depend on `start`.
    """
    hi = tl.zeros([], tl.float64)
    lo = hi - ONE
    point = tl.where((start > lo) & (start < hi), start, 0.5 * lo)
    numerator = hi
    size = hi + 1.0
    last = tl.zeros([], tl.int32) - 1
    step_number = 0
    while step_number < 256:
        positive = z > point
        saturated = z - ONE >= point
        # One reduction for both counts: the pool has at most 2^14 entries.
        counts = tl.sum(positive.to(tl.int32) + (saturated.to(tl.int32) << 15), 0)
        if counts == last:
            step_number = 256
        else:
            high = counts >> 15
            size = ((counts & 0x7FFF) - high).to(tl.float64)
            total = tl.sum(tl.where(positive & (saturated == 0), z, 0.0), 0)
            numerator = total + (high - TOPK).to(tl.float64) * ONE
            lo, hi, point, good = next_point(lo, hi, point, numerator, size, step_number)
            last = tl.where(good, counts, -1)
            step_number += 1
    return tl.floor(numerator / size)


@triton.jit
def _store_threshold(pool, threshold, TOPK: tl.constexpr, POOL: tl.constexpr, POOL_PAD: tl.constexpr):
    """tau of a pool that holds more than TOPK scores, bit for bit `selection.threshold.exact_threshold`."""
    following = tl.load(pool + TOPK)
    if following > float("-inf"):
        kth = round_to_grid(tl.load(pool + TOPK - 1))
        gap = round_to_grid(following) - kth
        if gap <= -ONE:
            tau = kth + tl.floor((gap - ONE) * 0.5)
        else:
            entry = tl.arange(0, POOL_PAD)
            z = round_to_grid(tl.load(pool + entry, mask=entry < POOL, other=float("-inf"))) - kth
            before = tl.load(threshold).to(tl.float64) + tl.load(threshold + 1).to(tl.float64)
            tau = kth + _solve(z, before / GRID - kth, TOPK)
        tau = tau * GRID
        high = tau.to(tl.float32)
        tl.debug_barrier()
        tl.store(threshold, high)
        tl.store(threshold + 1, (tau - high.to(tl.float64)).to(tl.float32))


@triton.jit
def cache_append_kernel(
    NEW_KEY, NEW_VALUE, NEW_SCORE, KEY, VALUE, SCORE, PLACES, THRESHOLD, LENGTH, POOLS,
    k_batch, k_head, v_batch, v_head, u_batch, u_head, kv_heads,
    TOPK: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, POOL: tl.constexpr, POOL_PAD: tl.constexpr,
    LOG_PAD: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Grid (b * hkv). NEW_KEY, NEW_VALUE [b, hkv, d], NEW_SCORE [b, hkv], strided; the rest as in `layout.Buffers`."""
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // kv_heads, pair % kv_heads
    RING: tl.constexpr = WINDOW + STRIDE
    ROWS: tl.constexpr = TOPK + RING
    key = KEY + pair * ROWS * D
    value = VALUE + pair * ROWS * D
    score = SCORE + pair * ROWS
    pool = POOLS + pair * POOL
    position = tl.load(LENGTH + pair)
    row = TOPK + position % RING
    dim = tl.arange(0, D_PAD)
    tl.store(key + row * D + dim, tl.load(NEW_KEY + batch * k_batch + head * k_head + dim, dim < D), dim < D)
    tl.store(
        value + row * D + dim, tl.load(NEW_VALUE + batch * v_batch + head * v_head + dim, dim < D), dim < D
    )
    tl.store(score + row, tl.load(NEW_SCORE + batch * u_batch + head * u_head))
    tl.debug_barrier()
    tl.store(LENGTH + pair, position + 1)
    if (position % STRIDE == 0) & (position >= WINDOW):
        first = position - STRIDE - WINDOW + 1
        changed = 0
        for base in range(0, STRIDE, CHUNK):
            lane = tl.arange(0, CHUNK)
            j = first + base + lane
            ok = (base + lane < STRIDE) & (j >= 0)
            u = tl.load(score + TOPK + (j + RING) % RING, mask=ok, other=float("-inf"))
            worst = tl.load(pool + POOL - 1)
            if tl.max(u, 0) > worst:
                changed = 1
                _offer(
                    key, value, score, pool, PLACES + pair * TOPK, first, base, worst,
                    TOPK, RING, STRIDE, POOL, POOL_PAD, LOG_PAD, CHUNK, D, D_PAD,
                )  # fmt: skip
        if POOL > TOPK:  # noqa: SIM102 - decided by the compiler, the next line by the device
            if changed > 0:
                _store_threshold(pool, THRESHOLD + pair * 2, TOPK, POOL, POOL_PAD)
