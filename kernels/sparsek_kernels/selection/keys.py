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
def merge_best(out_ptr, a_ptr, b_ptr, LOG_A: tl.constexpr, LOG_B: tl.constexpr):
    """out = the 2^LOG_A largest keys of two descending lists of 2^LOG_A and 2^LOG_B keys, descending. out may be b.

    The place of b[j] is j plus the number of keys of a before it, a binary search; what places remain belong to the
    keys of a in order. out starts as a copy of a, so a place that b took is one that differs from a. Reading all of a
    first also brings it into L1 for the search.
    """
    lane_a = tl.arange(0, 1 << LOG_A)
    lane_b = tl.arange(0, 1 << LOG_B)
    key_a = tl.load(a_ptr + lane_a)
    key_b = tl.load(b_ptr + lane_b)
    tl.debug_barrier()
    tl.store(out_ptr + lane_a, key_a)
    place_b = lane_b + count_above(a_ptr, key_b, LOG_A, True)
    tl.debug_barrier()
    tl.store(out_ptr + place_b, key_b, mask=place_b < (1 << LOG_A))
    tl.debug_barrier()
    key = tl.load(out_ptr + lane_a)
    free = key == key_a
    source = lane_a - tl.cumsum((key != key_a).to(tl.int32), 0)
    tl.store(out_ptr + lane_a, tl.load(a_ptr + source, mask=free, other=EMPTY), mask=free)
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
