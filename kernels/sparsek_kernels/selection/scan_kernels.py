# SPDX-License-Identifier: Apache-2.0
"""Kernels of the scan: the best keys before each block, without a chain of dependent merges.

List i of a sequence holds the best SIZE = 2^LOG_SIZE >= pool keys of its blocks 0 ... i. With a `SelectionState` the
carried pool is one more list, before the others. Lists are numbered through all sequences, and GROUP of them make a
group; a carried pool has the first group to itself (its number is GROUP - 1; numbers below are not used).

    scan_lists    (list, chunk, row)  level 0: best keys from the group's first list to each of its lists       X
                                      level l + 1: the same over the last lists of level l's groups             C
    add_carries   (list, row)         completes a level's lists by the level above, down to level 1

Level 0 is completed where it is used, in `prepare_blocks`. A place in a merged list is a rank: the key's place in its
own list plus the number of keys before it in each other list of the group, a binary search each. All searches of a
program are independent, and the ranks in all lists of the group are the prefix sums of the same counts. With 8 lists in
a group, a million tokens make four levels. Every place is written by one program: no atomics.
"""

import triton
import triton.language as tl

from .keys import EMPTY, count_above, find_sequence, make_keys, merge_best


@triton.jit(do_not_specialize=["num_seqs", "num_lists", "count", "pool", "heads", "unit"])
def scan_lists(
    score_ptr,
    source_ptr,
    target_ptr,
    cu_ptr,
    list_ptr,
    num_seqs,
    num_lists,
    count,
    pool,
    heads,
    unit,
    source_stride,
    source_offset,
    source_step,
    target_stride,
    score_stride_b,
    score_stride_s,
    score_stride_h,
    LOG_SIZE: tl.constexpr,
    LOG_LENGTH: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    STATE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Grid (lists x chunks, rows): a program places CHUNK keys of one source list in all lists of the group they reach.

    `count` lists of this level, each standing for `unit` of the `num_lists` of level 0. The source of list t has
    2^LOG_LENGTH keys at source_offset + t * source_step. BLOCKS: the sources are blocks of Y (level 0). STATE: a
    carried pool comes first (level 0).
    """
    SIZE: tl.constexpr = 1 << LOG_SIZE
    CHUNKS: tl.constexpr = (1 << LOG_LENGTH) // CHUNK
    index = tl.program_id(0) // CHUNKS + STATE * (GROUP - 1)
    chunk = tl.program_id(0) % CHUNKS
    row = tl.program_id(1).to(tl.int64)
    target = target_ptr + row * target_stride - STATE * (GROUP - 1) * SIZE
    source = source_ptr + row * source_stride + source_offset
    begin = index // GROUP * GROUP
    first = STATE * (GROUP - 1) + index * 0  # lists of the sequence that reaches the last list in `index`
    end = num_lists
    if PACKED:
        last = (index + 1) * unit - 1
        if last >= tl.load(list_ptr + num_seqs):
            return
        a = find_sequence(list_ptr, num_seqs, last)
        first = tl.load(list_ptr + a)
        end = tl.load(list_ptr + a + 1)
        if BLOCKS:
            source += tl.load(cu_ptr + a) - (row * 0 + first) * source_step
    low = tl.maximum(begin, first // unit)
    high = tl.minimum(tl.minimum(begin + GROUP, count), end // unit)
    lane = chunk * CHUNK + tl.arange(0, CHUNK)
    own = target + ((row * 0 + index) << LOG_SIZE)
    if STATE:  # noqa: SIM102 - decided by the compiler, the next line by the device
        if index == GROUP - 1:
            scores = score_ptr + (row // heads) * score_stride_b + (row % heads) * score_stride_h
            for at in range(0, SIZE, CHUNKS * CHUNK):
                i = at + lane
                score = tl.load(scores + i.to(tl.int64) * score_stride_s, mask=i < pool, other=float("-inf"))
                tl.store(own + i, make_keys(score, i), mask=i < SIZE)
            return
    other = begin + tl.arange(0, GROUP)
    counts = (other >= low) & (other < high) & (other != index)
    lists = source + tl.where(counts, other, index).to(tl.int64) * source_step
    key = tl.load(source + (row * 0 + index) * source_step + lane)
    # Keys along the first dimension: then the lanes of a warp search one list for neighbouring keys. Keys
    # differ, but for EMPTY: of equal ones those of the earlier list come first.
    bound = key[:, None] + (other > index).to(tl.int64)[None, :]
    before = count_above(lists[None, :], bound, LOG_LENGTH, True)
    place = lane[:, None] + tl.cumsum(tl.where(counts[None, :], before, 0), 1)
    reached = (other >= index) & (other < high)
    places = target + (other.to(tl.int64) << LOG_SIZE)[None, :] + place
    keys = key[:, None] + (other * 0).to(tl.int64)[None, :]
    tl.store(places, keys, mask=reached[None, :] & (place < SIZE))
    for at in range((index - low + 1) << LOG_LENGTH, SIZE, CHUNKS * CHUNK):
        tl.store(own + at + lane, lane.to(tl.int64) * 0 + EMPTY, mask=at + lane < SIZE)


@triton.jit(do_not_specialize=["num_seqs", "unit"])
def add_carries(
    list_ptr,
    target_ptr,
    carry_ptr,
    num_seqs,
    unit,
    target_stride,
    carry_stride,
    carry_offset,
    carry_step,
    LOG_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (lists after the first group, rows). Completes lists in place; arguments as in `scan_lists`, the carry as in
    `prepare_blocks`."""
    index = tl.program_id(0) + GROUP
    row = tl.program_id(1).to(tl.int64)
    group = index // GROUP
    if PACKED:
        last = (index + 1) * unit - 1
        if last >= tl.load(list_ptr + num_seqs):
            return
        if tl.load(list_ptr + find_sequence(list_ptr, num_seqs, last)) >= group * GROUP * unit:
            return
    target = target_ptr + row * target_stride + ((row * 0 + index) << LOG_SIZE)
    carry = carry_ptr + row * carry_stride + carry_offset + (row * 0 + group - 1) * carry_step
    merge_best(target, carry, target, LOG_SIZE)
