# SPDX-License-Identifier: Apache-2.0
"""Kernels of the score gradient: mean per slot with prefix sums inside a block of slots, prefix over blocks, gather.

Float64 sums in a fixed order, one writer per element: no atomics, bitwise reproducible.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from sparsek_kernels.launch import Launch, Named, Pass

from .plan import power_of_2
from .types import Selection


@triton.jit
def slot_means(
    query_ptr,
    size_ptr,
    prefix_ptr,
    total_ptr,
    cu_ptr,
    slot_ptr,
    num_seqs,
    num_slots,
    length,
    phase,
    stride,
    steps,
    num_blocks,
    query_stride,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (blocks of SLOTS slots, rows). mu_r = sum of query_sum over the slot's queries / |F_r|; writes its exclusive
    prefix inside the block to prefix [rows, num_slots + 1] and the block's sum to total [rows, num_blocks]."""
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    slot = block * SLOTS + tl.arange(0, SLOTS)
    live = slot < num_slots
    first = slot * stride - phase
    last = tl.minimum(first + stride, length)
    if PACKED:
        a = tl.zeros([SLOTS], tl.int32)
        top = a + num_seqs
        for _ in range(steps):
            middle = (a + top) // 2
            open_ = a < top
            owns = tl.load(slot_ptr + 1 + middle, mask=open_, other=0) <= slot
            a = tl.where(open_ & owns, middle + 1, a)
            top = tl.where(open_ & (owns == 0), middle, top)
        live = live & (a < num_seqs)
        first = tl.load(cu_ptr + a, mask=live, other=0)
        first += (slot - tl.load(slot_ptr + a, mask=live, other=0)) * stride
        last = tl.minimum(first + stride, tl.load(cu_ptr + a + 1, mask=live, other=0))
    total = tl.zeros([SLOTS], tl.float64)
    lane = tl.arange(0, WIDTH)
    for offset in range(0, stride, WIDTH):
        query = (first + offset)[:, None] + lane[None, :]
        inside = live[:, None] & (query >= 0) & (query < last[:, None]) & ((offset + lane)[None, :] < stride)
        total += tl.sum(tl.load(query_ptr + row * query_stride + query, mask=inside, other=0.0), 1).to(
            tl.float64
        )
    size = tl.load(size_ptr + row * num_slots + slot, mask=live, other=0)
    mean = tl.where(size > 0, total / tl.maximum(size, 1).to(tl.float64), 0.0)
    prefix = tl.cumsum(mean, 0)
    tl.store(prefix_ptr + row * (num_slots + 1) + slot, prefix - mean, mask=slot <= num_slots)
    tl.store(total_ptr + row * num_blocks + block, tl.sum(mean, 0))


@triton.jit
def block_prefix(total_ptr, num_blocks, N: tl.constexpr):
    """Grid (rows). Exclusive prefix sums of total [rows, num_blocks], in place."""
    row = tl.program_id(0).to(tl.int64)
    total_ptr += row * num_blocks
    carry = tl.zeros([], tl.float64)
    for first in range(0, num_blocks, N):
        i = first + tl.arange(0, N)
        total = tl.load(total_ptr + i, mask=i < num_blocks, other=0.0)
        tl.store(total_ptr + i, carry + (tl.cumsum(total, 0) - total), mask=i < num_blocks)
        carry += tl.sum(total, 0)


@triton.jit
def key_gradient(
    key_ptr,
    start_ptr,
    end_ptr,
    prefix_ptr,
    total_ptr,
    out_ptr,
    num_keys,
    num_slots,
    num_blocks,
    heads,
    key_stride,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of keys, rows). out [b, num_keys, heads] = key_sum - (S[end] - S[start]) if start < end, else 0."""
    row = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = j < num_keys
    start = tl.load(start_ptr + row * num_keys + j, mask=inside, other=0)
    end = tl.load(end_ptr + row * num_keys + j, mask=inside, other=0)
    live = start < end
    prefix_ptr += row * (num_slots + 1)
    total_ptr += row * num_blocks
    below = tl.load(prefix_ptr + start, mask=live, other=0.0)
    below += tl.load(total_ptr + start // SLOTS, mask=live, other=0.0)
    above = tl.load(prefix_ptr + end, mask=live, other=0.0)
    above += tl.load(total_ptr + end // SLOTS, mask=live, other=0.0)
    own = tl.load(key_ptr + row * key_stride + j, mask=live, other=0.0).to(tl.float64)
    out = (row // heads) * num_keys * heads + j.to(tl.int64) * heads + row % heads
    tl.store(out_ptr + out, tl.where(live, own - (above - below), 0.0).to(tl.float32), mask=inside)


@dataclass(frozen=True)
class _Sizes:
    """What the three kernels' numbers are from; num_seqs is None where unpacked, phase past % stride."""

    rows: int
    heads: int
    num_keys: int
    num_slots: int
    length: int
    stride: int
    phase: int
    num_seqs: int | None
    device: torch.device

    @property
    def width(self) -> int:
        return min(64, power_of_2(self.stride))

    @property
    def slots(self) -> int:
        """Slots of a block."""
        return max(64, min(1024, 4096 // self.width if self.stride <= 64 else 64))

    @property
    def blocks(self) -> int:
        return self.num_slots // self.slots + 1


def score_gradient_triton(
    selection: Selection, key_sum: torch.Tensor, query_sum: torch.Tensor, slot_table: torch.Tensor | None
) -> torch.Tensor:
    """`score_gradient` by kernels: three launches, no synchronisation.

    slot_table [num_seqs + 1] int32: slots before each packed sequence; None where unpacked.
    """
    b, heads, num_keys = key_sum.shape
    cu, device = selection.cu_seqlens, key_sum.device
    out = torch.empty(b, num_keys, heads, dtype=torch.float32, device=device)
    if out.numel() == 0:
        return out
    sizes = _Sizes(
        b * heads, heads, num_keys, selection.threshold.shape[-1], query_sum.shape[-1], selection.stride,
        selection.past % selection.stride, None if cu is None else cu.numel() - 1, device,
    )  # fmt: skip
    unused = selection.fraction_size  # in the places of tables that are never read
    buffers = {
        "query_sum": query_sum.contiguous(), "size": selection.fraction_size,
        "prefix": torch.empty(sizes.rows, sizes.num_slots + 1, dtype=torch.float64, device=device),
        "total": torch.empty(sizes.rows, sizes.blocks, dtype=torch.float64, device=device),
        "cu": unused if cu is None else cu, "slot_table": unused if slot_table is None else slot_table,
        "key_sum": key_sum.contiguous(), "start": selection.fraction_start, "end": selection.fraction_end,
        "out": out,
    }  # fmt: skip
    _kernels(sizes)(sizes, buffers)
    return out


@lru_cache(maxsize=256)
def _kernels(_sizes: _Sizes) -> Pass:
    return Pass(_launches)


def _launches(sizes: _Sizes, _buffers: Named) -> list[Launch]:
    seqs = 1 if sizes.num_seqs is None else sizes.num_seqs
    means = Launch(
        slot_means,
        (sizes.blocks, sizes.rows),
        (
            "query_sum", "size", "prefix", "total", "cu", "slot_table",
            seqs, sizes.num_slots, sizes.length, sizes.phase, sizes.stride, seqs.bit_length(), sizes.blocks,
            sizes.length,
        ),
        {"SLOTS": sizes.slots, "WIDTH": sizes.width, "PACKED": sizes.num_seqs is not None},
    )  # fmt: skip
    prefix = Launch(block_prefix, (sizes.rows,), ("total", sizes.blocks), {"N": 1024})
    gradient = Launch(
        key_gradient,
        (-(-sizes.num_keys // 512), sizes.rows),
        (
            "key_sum", "start", "end", "prefix", "total", "out",
            sizes.num_keys, sizes.num_slots, sizes.blocks, sizes.heads, sizes.num_keys,
        ),
        {"SLOTS": sizes.slots, "BLOCK": 512},
    )  # fmt: skip
    return [means, prefix, gradient]
