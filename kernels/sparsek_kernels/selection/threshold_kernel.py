# SPDX-License-Identifier: Apache-2.0
"""Device functions of a slot's threshold: exact tau and |F| of a pool that is the union of two sorted lists.

The pool holds the first `limit` keys of X and the first `reach` words of the block Y whose order is below `offered`
(`block_kernels.py`). What a step of the solver counts and sums in X takes one look at the ends of its CHUNKS chunks and
then the WIDTH keys of the two chunks that the two bounds fall into; Y is read LANES words at a time. Bit for bit the
tau of `threshold.py`.
"""

import triton
import triton.language as tl

from .keys import EMPTY, NEVER, grid_integer, key_score, round_to_grid

ONE = tl.constexpr(274877906944.0)  # 1 in units of the grid


@triton.jit
def word_score(word):
    """Score of a word of a prepared block."""
    order = (word >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def word_order(word):
    """Number of a word's candidate in its block."""
    return (word >> 16).to(tl.int32) & 0xFFFF


@triton.jit
def _passed_chunks(over_low, over_high, limit, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """How many whole chunks within `limit` end over the low and over the high bound."""
    whole = tl.arange(0, CHUNKS) * WIDTH + WIDTH <= limit
    both = tl.sum((over_low & whole).to(tl.int32) + ((over_high & whole).to(tl.int32) << 16), 0)
    return both & 0xFFFF, both >> 16


@triton.jit
def _chunk_scores(x_ptr, chunk, limit, WIDTH: tl.constexpr):
    """Scores of one chunk of X, -inf from `limit` on."""
    lane = chunk * WIDTH + tl.arange(0, WIDTH)
    return key_score(tl.load(x_ptr + lane, mask=lane < limit, other=EMPTY))


@triton.jit
def count_fractional(
    x_ptr, y_ptr, end_scores, tau, offered, limit, reach,
    CHUNKS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """#{0 < u - tau < 1} in the pool, tau in float64 as stored."""
    distance = end_scores.to(tl.float64) - tau
    low, high = _passed_chunks(distance > 0.0, distance >= 1.0, limit, CHUNKS, WIDTH)
    positive = _chunk_scores(x_ptr, low, limit, WIDTH).to(tl.float64) - tau > 0.0
    saturated = _chunk_scores(x_ptr, high, limit, WIDTH).to(tl.float64) - tau >= 1.0
    count = (low - high) * WIDTH + tl.sum(positive.to(tl.int32) - saturated.to(tl.int32), 0)
    inside = tl.zeros([LANES], tl.int32)
    for first in range(0, reach, LANES):
        lane = first + tl.arange(0, LANES)
        word = tl.load(y_ptr + lane, mask=lane < reach, other=NEVER)
        distance_y = word_score(word).to(tl.float64) - tau
        inside += ((word_order(word) < offered) & (distance_y > 0.0) & (distance_y < 1.0)).to(tl.int32)
    return count + tl.sum(inside, 0)


@triton.jit
def next_point(lo, hi, point, numerator, size, step_number):
    """(lo, hi, point, whether it is the active-set step) after F at `point` was found to have that sum and size.

    The step where it lies inside the bracket; half the bracket where it does not, and every second time from step 8 on.
    """
    higher = numerator > point * size
    lo = tl.where(higher, tl.maximum(lo, point), lo)
    hi = tl.where(higher, hi, tl.minimum(hi, point))
    step = numerator / tl.maximum(size, 1.0)
    good = (size > 0.0) & (step >= lo) & (step <= hi)
    good = good & ((step_number < 8) | (step_number % 2 == 0))
    return lo, hi, tl.where(good, step, 0.5 * (lo + hi)), good


@triton.jit
def solve(
    x_ptr, y_ptr, sums_ptr, ends, kth, topk, offered, limit, reach, start,
    CHUNKS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """tau - z_(k) in grid units, rounded down; F not empty. ends: grid units of the last key of each chunk of X.

    Active-set steps inside a bracket (`kernels/README.md`), from `start` where that lies inside; the result does not
    depend on it.
    """
    lo = kth * 0.0 - ONE
    hi = kth * 0.0
    point = tl.where((start > lo) & (start < hi), start, 0.5 * lo)
    numerator = hi
    size = hi + 1.0
    kth_integer = grid_integer(kth)
    last = tl.zeros([], tl.int32) - 1
    step_number = 0
    while step_number < 256:
        # z - 1 >= tau for integers z, as a strict comparison
        bound = tl.ceil(point) + ONE - 1.0
        low, high = _passed_chunks(ends - kth > point, ends - kth > bound, limit, CHUNKS, WIDTH)
        z_low = round_to_grid(_chunk_scores(x_ptr, low, limit, WIDTH)) - kth
        z_high = round_to_grid(_chunk_scores(x_ptr, high, limit, WIDTH)) - kth
        counts = tl.sum((z_low > point).to(tl.int32) + ((z_high > bound).to(tl.int32) << 16), 0)
        counts += low * WIDTH + (high * WIDTH << 16)
        # Sums over F: of the two chunks, and of those between them, which lie in F.
        total = tl.sum(
            tl.where((z_low > point) & (z_low <= bound), z_low, 0.0)
            + tl.where((z_high <= bound) & (high < low), z_high, 0.0),
            0,
        )
        between = low - high - 1
        sum_low = tl.load(sums_ptr + low - 1, mask=between > 0, other=0)
        sum_high = tl.load(sums_ptr + high, mask=between > 0, other=0)
        if between > 0:
            total += (sum_low - sum_high - between * WIDTH * kth_integer).to(tl.float64)
        count_y = tl.zeros([LANES], tl.int32)
        total_y = tl.zeros([LANES], tl.float64)
        for first in range(0, reach, LANES):
            lane = first + tl.arange(0, LANES)
            word = tl.load(y_ptr + lane, mask=lane < reach, other=NEVER)
            z = tl.where(word_order(word) < offered, round_to_grid(word_score(word)) - kth, float("-inf"))
            count_y += (z > point).to(tl.int32) + ((z > bound).to(tl.int32) << 16)
            total_y += tl.where((z > point) & (z <= bound), z, 0.0)
        counts += tl.sum(count_y, 0)
        if counts == last:
            step_number = 256
        else:
            saturated = counts >> 16
            size = ((counts & 0xFFFF) - saturated).to(tl.float64)
            numerator = total + tl.sum(total_y, 0) + (saturated - topk).to(tl.float64) * ONE
            lo, hi, point, good = next_point(lo, hi, point, numerator, size, step_number)
            last = tl.where(good, counts, -1)
            step_number += 1
    return tl.floor(numerator / size)
