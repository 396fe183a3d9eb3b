# SPDX-License-Identifier: Apache-2.0
"""Kernels of the blocks: candidates of a sequence (tokens that reach the pool in this call), BLOCK at a time.

    sequence_table   (1)           where each packed sequence's slots, tiles, blocks and lists begin
    sort_blocks      (block, row)  sorts one block's keys                                          Y
    prepare_blocks   (block, row)  completes the list before the block, and looks the block up in it

The list before a block (X) holds the best SIZE = 2^LOG_SIZE >= pool keys that precede it (`scan_kernels.py`). What the
walk would otherwise find out once per slot is found here, once per block:

    words    in Y's place, in the same order: score image << 32 | order << 16 | keys of X above; `order` is the
             candidate's number in the block
    sums     [CHUNKS] prefix sums of X's scores in grid units (modulo 2^64), by chunks of WIDTH keys
    useful   how many of the block's keys, its best, can ever be in a pool: fewer than `pool` keys of X are above them
"""

import triton
import triton.language as tl

from .keys import (
    EMPTY,
    NEVER,
    count_above,
    find_sequence,
    grid_integer,
    key_index,
    key_score,
    make_keys,
    merge_best,
    round_to_grid,
)


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


@triton.jit(do_not_specialize=["num_seqs", "candidate_base", "candidates", "pool", "window", "stride"])
def prepare_blocks(
    y_ptr,
    x_ptr,
    carry_ptr,
    sums_ptr,
    useful_ptr,
    cu_ptr,
    block_ptr,
    list_ptr,
    num_seqs,
    candidate_base,
    candidates,
    pool,
    window,
    stride,
    y_stride,
    x_stride,
    carry_stride,
    carry_offset,
    carry_step,
    sums_stride,
    useful_stride,
    LOG_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    STATE: tl.constexpr,
    HARD: tl.constexpr,
):
    """Grid (blocks, rows). A program owns its block, and X before it. carry_offset + g * carry_step: where the best
    keys up to the end of the scan's group g are."""
    CHUNKS: tl.constexpr = 1 << (LOG_SIZE // 2)
    WIDTH: tl.constexpr = (1 << LOG_SIZE) // CHUNKS
    number = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    y_ptr += row * y_stride
    block = number
    base = candidate_base
    first_list = number * 0
    if PACKED:
        a = find_sequence(block_ptr, num_seqs, number)
        if a == num_seqs:
            return
        base = tl.load(cu_ptr + a)
        length = tl.load(cu_ptr + a + 1) - base
        candidates = (length - 1) // stride * stride - window + 1
        y_ptr += base
        block = number - tl.load(block_ptr + a)
        first_list = tl.load(list_ptr + a)
    lane = tl.arange(0, BLOCK)
    inside = block * BLOCK + lane < candidates
    keys = tl.load(y_ptr + block * BLOCK + lane, mask=inside, other=EMPTY)
    above = lane * 0
    if block + STATE > 0:
        place = first_list + block - 1 + STATE
        flat = place + STATE * (GROUP - 1)  # with a state, its list alone is the first group
        x = x_ptr + row * x_stride + ((row * 0 + place) << LOG_SIZE)
        group = flat // GROUP
        if (group > 0) & (first_list < group * GROUP):
            carry = carry_ptr + row * carry_stride + carry_offset + (row * 0 + group - 1) * carry_step
            merge_best(x, carry, x, LOG_SIZE)
        above = count_above(x, keys, LOG_SIZE, False)
        if not HARD:
            part = tl.arange(0, CHUNKS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
            z = tl.sum(grid_integer(round_to_grid(key_score(tl.load(x + part)))), 1)
            sums = sums_ptr + row * sums_stride + (row * 0 + place) * CHUNKS
            tl.store(sums + tl.arange(0, CHUNKS), tl.cumsum(z, 0))
    order = key_index(keys) - base - block * BLOCK
    word = (keys >> 32 << 32) | (order << 16).to(tl.int64) | above.to(tl.int64)
    tl.store(y_ptr + block * BLOCK + lane, tl.where(keys == EMPTY, NEVER, word), mask=inside)
    useful = tl.sum((inside & (keys != EMPTY) & (above < pool)).to(tl.int32), 0)
    tl.store(useful_ptr + row * useful_stride + number, useful)
