# SPDX-License-Identifier: Apache-2.0
"""Device functions shared by the selection kernels: keys, merges of sorted lists, sequence look-up.

A key is an int64 whose signed order is (score descending, index ascending): the order-preserving integer image of the
float32 score in the high word, the complement of the index in the low word. `EMPTY` is below every key.
"""

from __future__ import annotations

import triton
import triton.language as tl

EMPTY = tl.constexpr(-(1 << 63))
LOW = tl.constexpr((1 << 31) - 1)
NEVER = tl.constexpr(0xFFFF << 16)
"""Word of a prepared block (`block_kernels.py`) that is offered to no slot."""
LIMIT = tl.constexpr(4611686018427387904.0)  # 2^62


@triton.jit
def make_keys(score, index):
    """float32 scores and int32 indices -> keys; -inf becomes EMPTY; -0.0 ties with +0.0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & LOW)
    key = (order.to(tl.int64) << 32) | (index ^ LOW).to(tl.int64)
    return tl.where(score == float("-inf"), EMPTY, key)


@triton.jit
def key_score(key):
    """Score of a key, -inf where EMPTY."""
    order = (key >> 32).to(tl.int32)
    score = (order ^ ((order >> 31) & LOW)).to(tl.float32, bitcast=True)
    return tl.where(key == EMPTY, float("-inf"), score)


@triton.jit
def key_index(key):
    """Index of a key (int32); LOW where EMPTY."""
    return (key & LOW).to(tl.int32) ^ LOW


@triton.jit
def count_above(list_ptr, key, LOG_COUNT: tl.constexpr, OR_EQUAL: tl.constexpr):
    """How many keys of a descending list of 2^LOG_COUNT keys in memory are greater than (or equal to) each key."""
    below = (key * 0).to(tl.int32)
    for i in tl.static_range(LOG_COUNT):
        probe = tl.load(list_ptr + below + ((1 << (LOG_COUNT - 1 - i)) - 1))
        greater = probe >= key if OR_EQUAL else probe > key
        below += tl.where(greater, 1 << (LOG_COUNT - 1 - i), 0)
    probe = tl.load(list_ptr + below)
    below += (probe >= key if OR_EQUAL else probe > key).to(tl.int32)
    return below


@triton.jit
def merge_best(out_ptr, a_ptr, b_ptr, LOG_SIZE: tl.constexpr):
    """out = the 2^LOG_SIZE largest keys of two descending lists of as many keys, descending. out may be b.

    The place of b[j] is j plus the number of keys of a before it, a binary search; what places remain belong to the
    keys of a in order. out starts as a copy of a, so a place that b took is one that differs from a. Reading all of a
    first also brings it into L1 for the search. Keys of b below the last one of a have no place: the second and the
    last two quarters of b are searched for only where they begin above it.
    """
    QUARTER: tl.constexpr = 1 << (LOG_SIZE - 2)
    lane = tl.arange(0, 4 * QUARTER)
    quarter = tl.arange(0, QUARTER)
    half = tl.arange(0, 2 * QUARTER)
    key_a = tl.load(a_ptr + lane)
    last_a = tl.load(a_ptr + 4 * QUARTER - 1)
    first = tl.load(b_ptr + quarter)
    second = tl.load(b_ptr + QUARTER + quarter)
    rest = tl.load(b_ptr + 2 * QUARTER + half)
    begins_second = tl.load(b_ptr + QUARTER)
    begins_rest = tl.load(b_ptr + 2 * QUARTER)
    tl.debug_barrier()
    tl.store(out_ptr + lane, key_a)
    tl.debug_barrier()
    place = quarter + count_above(a_ptr, first, LOG_SIZE, True)
    tl.store(out_ptr + place, first, mask=place < 4 * QUARTER)
    if begins_second > last_a:
        place = QUARTER + quarter + count_above(a_ptr, second, LOG_SIZE, True)
        tl.store(out_ptr + place, second, mask=place < 4 * QUARTER)
    if begins_rest > last_a:
        place_rest = 2 * QUARTER + half + count_above(a_ptr, rest, LOG_SIZE, True)
        tl.store(out_ptr + place_rest, rest, mask=place_rest < 4 * QUARTER)
    tl.debug_barrier()
    key = tl.load(out_ptr + lane)
    free = key == key_a
    source = lane - tl.cumsum((key != key_a).to(tl.int32), 0)
    tl.store(out_ptr + lane, tl.load(a_ptr + source, mask=free, other=EMPTY), mask=free)
    tl.debug_barrier()


@triton.jit
def find_sequence(offset_ptr, num_seqs, x):
    """Sequence that owns item x: the number of i in 1 ... num_seqs with offset[i] <= x; num_seqs for "none"."""
    lo = x * 0
    hi = lo + num_seqs
    while lo < hi:
        middle = (lo + hi) // 2
        owns = tl.load(offset_ptr + 1 + middle) <= x
        lo = tl.where(owns, middle + 1, lo)
        hi = tl.where(owns, hi, middle)
    return lo


@triton.jit
def round_to_grid(score):
    """Scores in units of the grid of `threshold.py`, as float64 integers."""
    z = score.to(tl.float64)
    return tl.where(tl.abs(z) < 8192.0, (z + 24576.0) - 24576.0, z) * 274877906944.0


@triton.jit
def grid_integer(z):
    """Grid units as int64. Scores beyond 2^24 saturate: there F holds nothing but ties of z_(k), whose sum cancels."""
    return tl.minimum(tl.maximum(z, -LIMIT), LIMIT).to(tl.int64)
