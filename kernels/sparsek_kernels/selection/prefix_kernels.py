# SPDX-License-Identifier: Apache-2.0
"""Kernels that prepare the walk: sorted blocks of candidates, and the best keys before each block.

The candidates of a sequence (tokens that reach the pool in this call) are cut into blocks of BLOCK tokens.

    sort_blocks    (block, row)  sorts one block's keys                                             Y
    scan_groups    (group, row)  inclusive scan inside a group of lists: keep the best SIZE           X
    scan_carries   (row)         the same over the groups' totals                                     C
    add_carries    (list, row)   merges C into X

List i of a sequence holds the best SIZE = 2^LOG_SIZE >= pool keys of its blocks 0 ... i (with a state: of the carried
pool and blocks 0 ... i - 1). "Keep the best SIZE of two sorted lists" is associative, so the order of merging cannot
matter. Every list is written by one program: no atomics. Each list is merged twice, hence linear work; the chain of
dependent merges is about 2 sqrt(number of lists).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import EMPTY, find_sequence, make_keys, merge_best


@triton.jit
def sequence_table(
    cu_ptr,
    slot_ptr,
    tile_ptr,
    block_ptr,
    list_ptr,
    num_seqs,
    window,
    stride,
    tile,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
):
    """One program: exclusive prefix sums, over the packed sequences, of slots, list tiles, blocks and lists."""
    slot = tl.zeros([], tl.int32)
    tiles = tl.zeros([], tl.int32)
    block = tl.zeros([], tl.int32)
    lists = tl.zeros([], tl.int32)
    tl.store(slot_ptr, slot)
    tl.store(tile_ptr, tiles)
    tl.store(block_ptr, block)
    tl.store(list_ptr, lists)
    for first in range(0, num_seqs, N):
        a = first + tl.arange(0, N)
        inside = a < num_seqs
        length = tl.load(cu_ptr + a + 1, mask=inside, other=0) - tl.load(cu_ptr + a, mask=inside, other=0)
        num_slots = (length + stride - 1) // stride
        candidates = tl.maximum((num_slots - 1) * stride - window + 1, 0)
        num_blocks = (candidates + BLOCK - 1) // BLOCK
        num_lists = tl.maximum(num_blocks - 1, 0)
        num_tiles = (length + tile - 1) // tile
        tl.store(slot_ptr + a + 1, slot + tl.cumsum(num_slots, 0), mask=inside)
        tl.store(tile_ptr + a + 1, tiles + tl.cumsum(num_tiles, 0), mask=inside)
        tl.store(block_ptr + a + 1, block + tl.cumsum(num_blocks, 0), mask=inside)
        tl.store(list_ptr + a + 1, lists + tl.cumsum(num_lists, 0), mask=inside)
        slot += tl.sum(num_slots, 0)
        tiles += tl.sum(num_tiles, 0)
        block += tl.sum(num_blocks, 0)
        lists += tl.sum(num_lists, 0)


@triton.jit(do_not_specialize=["num_seqs", "candidate_base", "candidates", "heads", "window", "stride"])
def sort_blocks(
    score_ptr,
    y_ptr,
    cu_ptr,
    block_ptr,
    num_seqs,
    candidate_base,
    candidates,
    heads,
    window,
    stride,
    y_stride,
    score_stride_b,
    score_stride_s,
    score_stride_h,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (blocks, rows). Writes the block's keys, descending, at the block's place in Y [rows, y_stride]."""
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    offset = block * 0
    base = candidate_base
    if PACKED:
        a = find_sequence(block_ptr, num_seqs, block)
        if a == num_seqs:
            return
        base = tl.load(cu_ptr + a)
        length = tl.load(cu_ptr + a + 1) - base
        candidates = (length - 1) // stride * stride - window + 1
        offset = base
        block = block - tl.load(block_ptr + a)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < candidates
    scores = score_ptr + (row // heads) * score_stride_b + (row % heads) * score_stride_h
    index = base + i
    score = tl.load(scores + index.to(tl.int64) * score_stride_s, mask=inside, other=float("-inf"))
    keys = tl.sort(make_keys(score, index), descending=True)
    tl.store(y_ptr + row * y_stride + offset + i, keys, mask=inside)


@triton.jit
def _list_source(
    y_ptr, cu_ptr, list_ptr, num_seqs, flat, PACKED: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr
):
    """Where list `flat` comes from: (Y pointer, index of the list in its sequence)."""
    if PACKED:
        a = find_sequence(list_ptr, num_seqs, flat)
        local = flat - tl.load(list_ptr + a)
        return y_ptr + tl.load(cu_ptr + a) + local * BLOCK, local
    else:
        return y_ptr + (flat - STATE) * BLOCK, flat


@triton.jit(do_not_specialize=["num_seqs", "num_lists", "pool", "heads", "group"])
def scan_groups(
    score_ptr,
    y_ptr,
    x_ptr,
    cu_ptr,
    list_ptr,
    num_seqs,
    num_lists,
    pool,
    heads,
    y_stride,
    x_stride,
    score_stride_b,
    score_stride_s,
    score_stride_h,
    group,
    LOG_SIZE: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    STATE: tl.constexpr,
):
    """Grid (groups, rows). X [rows, lists, SIZE]: for each list of the group, the best keys since the group's start, or
    since its sequence's start where that is later. All blocks here are full (a sequence's last block has no list)."""
    first = tl.program_id(0) * group
    row = tl.program_id(1).to(tl.int64)
    y_ptr += row * y_stride
    x_ptr += row * x_stride
    if PACKED:
        num_lists = tl.load(list_ptr + num_seqs)
    lane = tl.arange(0, 1 << LOG_SIZE)
    for flat in range(first, tl.minimum(first + group, num_lists)):
        source, local = _list_source(y_ptr, cu_ptr, list_ptr, num_seqs, flat, PACKED, STATE, 1 << LOG_BLOCK)
        target = x_ptr + ((row * 0 + flat) << LOG_SIZE)
        if flat < STATE:
            scores = score_ptr + (row // heads) * score_stride_b + (row % heads) * score_stride_h
            score = tl.load(
                scores + lane.to(tl.int64) * score_stride_s, mask=lane < pool, other=float("-inf")
            )
            tl.store(target + lane, make_keys(score, lane))
        elif (local == 0) | (flat == first):
            tl.store(target + lane, tl.load(source + lane, mask=lane < (1 << LOG_BLOCK), other=EMPTY))
        else:
            merge_best(target, target - (1 << LOG_SIZE), source, LOG_SIZE, LOG_BLOCK)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["num_seqs", "num_groups", "group"])
def scan_carries(
    x_ptr,
    c_ptr,
    list_ptr,
    num_seqs,
    num_groups,
    x_stride,
    c_stride,
    group,
    LOG_SIZE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (rows). C [rows, groups, SIZE]: best keys before group g of the sequence that reaches into it."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    c_ptr += row * c_stride
    lane = tl.arange(0, 1 << LOG_SIZE)
    if PACKED:
        num_groups = (tl.load(list_ptr + num_seqs) + group - 1) // group
    for index in range(1, num_groups):
        flat = index * group - 1
        local = flat
        if PACKED:
            local = flat - tl.load(list_ptr + find_sequence(list_ptr, num_seqs, flat))
        total = x_ptr + ((row * 0 + flat) << LOG_SIZE)
        target = c_ptr + ((row * 0 + index) << LOG_SIZE)
        if local >= group:
            merge_best(target, target - (1 << LOG_SIZE), total, LOG_SIZE, LOG_SIZE)
        else:
            tl.store(target + lane, tl.load(total + lane))
        tl.debug_barrier()


@triton.jit(do_not_specialize=["num_seqs", "group"])
def add_carries(
    x_ptr,
    c_ptr,
    list_ptr,
    num_seqs,
    x_stride,
    c_stride,
    group,
    LOG_SIZE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (lists after the first group, rows). Completes X in place."""
    flat = tl.program_id(0) + group
    row = tl.program_id(1).to(tl.int64)
    index = flat // group
    if PACKED:
        if flat >= tl.load(list_ptr + num_seqs):
            return
        local = flat - tl.load(list_ptr + find_sequence(list_ptr, num_seqs, flat))
        if local <= flat - index * group:
            return
    target = x_ptr + row * x_stride + ((row * 0 + flat) << LOG_SIZE)
    carry = c_ptr + row * c_stride + ((row * 0 + index) << LOG_SIZE)
    merge_best(target, carry, target, LOG_SIZE, LOG_SIZE)
