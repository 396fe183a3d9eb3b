# SPDX-License-Identifier: Apache-2.0
"""Launches the selection kernels. Grids and buffers depend on shapes only, so the host never waits for the device.

What follows from shapes and settings (launch shapes, sizes, the arguments of every kernel) is derived once and kept in
a `Call`; a repeated call allocates six buffers and launches.

Transient bytes per candidate and row: 8 (Y) + 8 SIZE / BLOCK (X, and little more), gone before the intervals are
written, and the larger of the scan's carries (X / GROUP) and the boundaries (16 per slot, or 8 where slots are many).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from sparsek_kernels.launch import Launch

from .block_kernels import prepare_blocks, sequence_table, sort_blocks
from .interval_kernel import intervals
from .plan import Shape, make_plan, power_of_2, scan_levels
from .scan_kernels import add_carries, scan_lists
from .torch_backend import EMPTY
from .types import list_tile
from .walk_kernel import walk

INDEXED_STRIDE = 8
"""Below this stride a slot's boundaries are kept as int32 indices, not int64 keys: slower searches, half the memory."""
CALLS = 256
"""Shapes whose launches are remembered."""
TABLES = ("slot_table", "tile_table", "block_table", "list_table")
LOW = (1 << 31) - 1


class Parts:
    """Buffers that lie one after the other in one allocation, each at a multiple of `align` bytes."""

    def __init__(self, align: int = 1, **counts: tuple[torch.dtype, int]) -> None:
        self.at: dict[str, tuple[int, torch.dtype, int]] = {}
        self.bytes = 0
        for name, (dtype, count) in counts.items():
            self.at[name] = (self.bytes, dtype, count)
            self.bytes += -(-count * dtype.itemsize // align) * align

    def view(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        first, dtype, count = self.at[name]
        return tensor.view(-1).view(torch.uint8)[first : first + count * dtype.itemsize].view(dtype)

    def add(self, buffers: dict[str, Any], tensor: torch.Tensor, addresses: bool) -> None:
        """The buffers in `tensor`: as views for Triton to compile with; as addresses once it has, which cost the host
        less."""
        if addresses:
            start = tensor.data_ptr()
            for name, (first, _, _) in self.at.items():
                buffers[name] = start + first
        else:
            for name in self.at:
                buffers[name] = self.view(tensor, name)


class Call:
    """Sizes and launches of every call of one `Shape`.

    Transient: Y [rows, candidates] and X [rows, lists, SIZE] int64, blocks and the best keys before each; c1, c2, ...
    [rows, lists of the level, SIZE], the scan's upper levels; best and worst [rows, slots], the boundaries of top-k and
    pool, in the same place afterwards.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape, geometry = shape, shape.geometry
        window, stride, pool, topk = geometry.window, geometry.stride, geometry.pool, shape.topk
        num_keys, num_slots, rows = shape.num_keys, shape.num_slots, shape.b * shape.heads
        tile, state, packed = list_tile(stride), int(geometry.stateful), shape.num_seqs is not None
        num_seqs = shape.num_seqs if shape.num_seqs is not None else 1
        candidates = num_keys if packed else geometry.offered(num_slots - 1)
        plan = make_plan(candidates, num_slots, rows, pool)
        group, size, block = plan.group, max(16, power_of_2(pool)), plan.block
        log_size, chunks = size.bit_length() - 1, 1 << ((size.bit_length() - 1) // 2)
        if packed:
            num_blocks, num_x = num_keys // block + num_seqs, num_keys // block
        else:
            num_blocks = max(-(-candidates // block), 1) if num_slots else 0
            num_x = max(num_blocks - 1, 0) + state
        skipped = state * (
            group - 1
        )  # numbers of lists that do not exist: a carried pool has a group to itself
        levels = scan_levels(num_x + skipped, group)
        self.block, self.num_x, self.size, self.candidates = block, num_x, size, candidates
        self.indexed = stride < INDEXED_STRIDE
        int64, int32, float32 = torch.int64, torch.int32, torch.float32
        index = int32 if self.indexed else int64
        self.work = Parts(
            16,
            x=(int64, rows * num_x * size),
            y=(int64, rows * candidates),
            sums=(int64, rows * num_x * chunks),
            useful=(int32, rows * num_blocks),
        )
        self.carries = Parts(**{f"c{i}": (int64, rows * n * size) for i, n in enumerate(levels) if i})
        self.bounds = Parts(best=(index, rows * num_slots), worst=(index, rows * num_slots))
        self.thresholds = Parts(high=(float32, rows * num_slots), low=(float32, rows * num_slots))
        self.table = Parts(**dict.fromkeys(TABLES, (int32, num_seqs + 1)))
        self.keys = Parts(**dict.fromkeys(("evict", "start", "end"), (int32, rows * num_keys)))

        self.scan: list[Launch] = []
        cu, slot_table, tile_table, block_table, list_table = ("cu", *TABLES) if packed else ("size",) * 5
        scores, base, heads = shape.strides, geometry.candidate_base, shape.heads
        y_stride, x_stride = candidates, num_x * size

        def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
            self.scan.append(Launch(kernel, grid, arguments, constants))

        if packed:
            launch(
                sequence_table, (1,), "cu", *TABLES, num_seqs, window, stride, tile, BLOCK=block, N=1024
            )  # fmt: skip
        if candidates:
            launch(
                sort_blocks, (num_blocks, rows),
                "scores", "y", cu, block_table, num_seqs, base, candidates, heads, window, stride, y_stride, *scores,
                BLOCK=block, PACKED=packed, num_warps=plan.sort_warps,
            )  # fmt: skip
        names = ["x", *self.carries.at]
        strides = [x_stride, *(n * size for n in levels[1:])]
        # Where the carry of a level's group 1 lies, the next ones in steps of SIZE: in the level above, or, for the
        # only carry of the top level, at the end of its own group 0.
        carries = [(name, stride, 0) for name, stride in zip(names[1:], strides[1:], strict=True)]
        carries.append((names[-1], strides[-1], (group - 1 - (skipped if len(levels) == 1 else 0)) * size))
        for level, lists in enumerate(levels if num_x else []):
            length = size if level else min(block, size)
            chunk = min(plan.chunk, length)
            step = group * size if level else block
            offset = (group - 1 - (skipped if level == 1 else 0)) * size if level else -state * group * block
            launch(
                scan_lists, ((lists - (0 if level else skipped)) * (length // chunk), rows),
                "scores", names[level - 1] if level else "y", names[level], cu, list_table, num_seqs, levels[0], lists,
                pool, heads, group**level, strides[level - 1] if level else y_stride, offset, step, strides[level],
                *scores, LOG_SIZE=log_size, LOG_LENGTH=length.bit_length() - 1, CHUNK=chunk, GROUP=group, PACKED=packed,
                STATE=0 if level else state, BLOCKS=level == 0, num_warps=plan.scan_warps,
            )  # fmt: skip
        for level in range(len(levels) - 1, 0, -1):
            if levels[level] > group:
                name, stride_c, offset = carries[level]
                launch(
                    add_carries, (levels[level] - group, rows),
                    list_table, names[level], name, num_seqs, group**level, strides[level], stride_c, offset, size,
                    LOG_SIZE=log_size, GROUP=group, PACKED=packed, num_warps=plan.merge_warps,
                )  # fmt: skip
        if num_blocks:
            name, stride_c, offset = carries[0]
            launch(
                prepare_blocks, (num_blocks, rows),
                "y", "x", name, "sums", "useful", cu, block_table, list_table, num_seqs, base, candidates, pool, window,
                stride, y_stride, x_stride, stride_c, offset, size, num_x * chunks, num_blocks,
                LOG_SIZE=log_size, BLOCK=block, GROUP=group, PACKED=packed, STATE=state, HARD=shape.hard,
                num_warps=plan.merge_warps,
            )  # fmt: skip
        if num_slots:
            lead = 0 if packed else -geometry.slot_of(0) % plan.slots
            launch(
                walk, (-(-(num_slots + lead) // plan.slots), rows),
                "y", "x", "sums", "useful", "best", "worst", "high", "low", "size", "lists", cu, slot_table, tile_table,
                block_table, list_table,
                num_seqs, num_slots, shape.num_tiles, base, candidates, geometry.first_candidate,
                geometry.first_refresh, topk, pool, window, stride, tile // stride, y_stride, x_stride,
                num_x * chunks, num_blocks, plan.slots, lead, LOG_SIZE=log_size, BLOCK=block,
                LANES=min(plan.lanes, block), PLACES=min(512, max(16, power_of_2(topk))),
                PACKED=packed, STATE=state, HARD=shape.hard, INDEXED=self.indexed,
                num_warps=plan.walk_warps, maxnreg=plan.walk_registers,
            )  # fmt: skip
        self.intervals = Launch(
            intervals, (-(-num_keys // plan.interval_block), rows),
            (
                "scores", "best", "worst", "high", "low", "evict", "start", "end", cu, slot_table,
                num_seqs, num_keys, num_slots, pool, geometry.token_base, base, geometry.past, geometry.s,
                geometry.first_refresh, heads, window, stride, max(num_slots, num_seqs).bit_length(), *scores,
            ),
            {
                "BLOCK": plan.interval_block, "PACKED": packed, "STATE": state, "INDEXED": self.indexed,
                "num_warps": plan.interval_warps,
            },
        )  # fmt: skip

    def run(
        self, scores: torch.Tensor, cu_seqlens: torch.Tensor | None, want_pool: bool
    ) -> tuple[torch.Tensor, ...]:
        """-> (thresholds [2, b, heads, R], sizes [b, heads, R], lists [b, heads, NT, topk],
        intervals [3, b, heads, E], pool keys of the last slot [b, heads, pool] int64, empty if not wanted)."""
        shape, rows, slots = self.shape, (self.shape.b, self.shape.heads), self.shape.num_slots

        def empty(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(sizes, dtype=dtype, device=scores.device)

        lists = empty(*rows, shape.num_tiles, shape.topk, dtype=torch.int32)
        thresholds = empty(2, *rows, slots, dtype=torch.float32)
        sizes = empty(*rows, slots, dtype=torch.int32)
        scratch = empty(max(self.carries.bytes, self.bounds.bytes), dtype=torch.uint8)
        work = empty(self.work.bytes, dtype=torch.uint8)
        addresses = self.intervals.compiled is not None
        buffers: dict[str, Any] = {"scores": scores, "size": sizes, "lists": lists}
        self.carries.add(buffers, scratch, addresses)
        self.bounds.add(buffers, scratch, addresses)
        self.thresholds.add(buffers, thresholds, addresses)
        self.work.add(buffers, work, addresses)
        if cu_seqlens is not None:
            lists.fill_(-1)
            buffers["cu"] = cu_seqlens
            self.table.add(buffers, empty(self.table.bytes, dtype=torch.uint8), addresses)
        for launch in self.scan:
            launch(buffers)
        pool = (
            self._last_pool(work).unflatten(0, rows)
            if want_pool
            else thresholds.new_empty(0, dtype=torch.int64)
        )
        for name in self.work.at:
            del buffers[name]
        del work  # its memory serves the intervals
        intervals = empty(3, *rows, shape.num_keys, dtype=torch.int32)
        self.keys.add(buffers, intervals, addresses)
        self.intervals(buffers)
        return thresholds, sizes, lists, intervals, pool

    def _last_pool(self, work: torch.Tensor) -> torch.Tensor:
        """Pool keys [rows, pool] of the last slot of an unpacked call."""
        geometry, rows = self.shape.geometry, self.shape.b * self.shape.heads
        block = max(-(-self.candidates // self.block) - 1, 0)
        before = block - 1 + int(geometry.stateful)
        first = block * self.block
        words = self.work.view(work, "y").view(rows, self.candidates)[:, first:]
        index = geometry.candidate_base + first + (words >> 16 & 0xFFFF)
        keys = [words >> 32 << 32 | (index ^ LOW)]
        if before >= 0:
            keys.append(self.work.view(work, "x").view(rows, self.num_x, self.size)[:, before])
        pool = torch.cat(keys, dim=1)
        pool = torch.nn.functional.pad(pool, (0, max(0, geometry.pool - pool.shape[1])), value=EMPTY)
        return pool.sort(dim=1, descending=True).values[:, : geometry.pool]


remembered_call = lru_cache(maxsize=CALLS)(Call)
