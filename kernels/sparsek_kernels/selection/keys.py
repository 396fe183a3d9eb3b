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
def merge_best(best, list_ptr, count, SIZE: tl.constexpr):
    """The SIZE largest of a descending register list and a descending list in memory of `count` keys, descending.

    The elementwise maximum of one list and the reverse of the other holds the SIZE largest and is bitonic.
    """
    reverse = SIZE - 1 - tl.arange(0, SIZE)
    other = tl.load(list_ptr + reverse, mask=reverse < count, other=EMPTY)
    return tl.bitonic_merge(tl.maximum(best, other), descending=True)


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
