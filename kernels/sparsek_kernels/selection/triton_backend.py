# SPDX-License-Identifier: Apache-2.0
"""Launches the selection kernels. Grids and buffers depend on shapes only, so the host never waits for the device.

What follows from shapes and settings (launch shapes, sizes, the arguments of every kernel) is derived once and kept in
a `Call`; a repeated call allocates six buffers and launches.

Transient bytes per candidate and row: 8 (Y) + 8 SIZE / BLOCK (X) + 8 SIZE / (BLOCK GROUP) (carries), gone before the
intervals are written, and per slot 16, or 8 where slots are many.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Any

import torch

from sparsek_kernels.launch import Launch

from .geometry import Geometry
from .interval_kernel import intervals
from .prefix_kernels import add_carries, scan_carries, scan_groups, sequence_table, sort_blocks
from .threshold import join
from .torch_backend import EMPTY, extend_scores, next_state
from .types import Selection, SelectionState, list_tile
from .walk_kernel import walk

INDEXED_STRIDE = 8
"""Below this stride a slot's boundaries are kept as int32 indices, not int64 keys: slower searches, half the memory."""
CALLS = 256
"""Shapes whose launches are remembered."""
TABLES = ("slot_table", "tile_table", "block_table", "list_table")


@dataclass(frozen=True)
class Plan:
    """Launch shapes. They change speed and memory, never a bit of the result.

    block  candidates per block, a power of two      sort_warps  warps per program: of the sort of a block,
    group  lists per program of the scan             scan_warps    of the scan's merges,
    slots  refresh slots per program of the walk     walk_warps    of the walk, and its registers per thread: more
                                                       of either means fewer programs at a time
    """

    block: int
    group: int
    slots: int
    sort_warps: int
    scan_warps: int
    walk_warps: int
    walk_registers: int


def _power_of_2(n: int) -> int:
    """Smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def make_plan(candidates: int, slots: int, rows: int, pool: int) -> Plan:
    """Shapes for about `candidates` candidates and `slots` slots in each of `rows` rows."""
    size = _power_of_2(pool)
    block = min(max(size // 4, 256), 2048)
    lists = max(1, candidates // block)
    return Plan(
        block=block,
        group=max(4, isqrt(lists)),
        slots=min(256, _power_of_2(max(1, rows * slots // (132 * 16)))),
        sort_warps=max(1, block // 512) if rows * lists > 132 * 8 else max(1, block // 128),
        scan_warps=min(max(size // 256, 4), 16),
        walk_warps=max(1, block // 512),
        walk_registers=128,
    )


@dataclass(frozen=True)
class Shape:
    """What the launches of a call depend on: scores [b, num_keys, heads], their strides, and the settings.

    aligned   whether the addresses of scores and cu_seqlens are multiples of 16
    num_seqs  packed sequences, None where unpacked
    """

    device: torch.device
    b: int
    num_keys: int
    heads: int
    strides: tuple[int, ...]
    aligned: tuple[bool, ...]
    num_seqs: int | None
    topk: int
    hard: bool
    geometry: Geometry

    @property
    def num_slots(self) -> int:
        if self.num_seqs is None:
            return self.geometry.num_slots
        return self.num_keys // self.geometry.stride + self.num_seqs

    @property
    def num_tiles(self) -> int:
        if self.num_seqs is None:
            return self.geometry.num_tiles
        return self.num_keys // list_tile(self.geometry.stride) + self.num_seqs


class Call:
    """Sizes and launches of every call of one `Shape`.

    Transient: Y [rows, candidates] and X [rows, lists, SIZE] int64, sorted blocks and the best keys before each;
    carries [rows, groups, SIZE]; best and worst [rows, slots], the boundaries of top-k and pool.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape, geometry = shape, shape.geometry
        window, stride, pool, topk = geometry.window, geometry.stride, geometry.pool, shape.topk
        num_keys, num_slots, rows = shape.num_keys, shape.num_slots, shape.b * shape.heads
        tile, state, packed = list_tile(stride), int(geometry.stateful), shape.num_seqs is not None
        num_seqs = shape.num_seqs if shape.num_seqs is not None else 1
        candidates = num_keys if packed else geometry.offered(num_slots - 1)
        plan = make_plan(candidates, num_slots, rows, pool)
        size, block = max(16, _power_of_2(pool)), plan.block
        if packed:
            num_blocks, num_lists = num_keys // block + num_seqs, num_keys // block
        else:
            num_blocks = -(-candidates // block)
            num_lists = max(num_blocks, 1) - 1 + state
        num_groups = -(-num_lists // plan.group)
        num_carries = num_groups if num_groups > 1 else 0
        self.block, self.x_shape, self.y_shape = block, (rows, num_lists, size), (rows, candidates)
        self.storage = {
            "bounds": _parts(best=rows * num_slots, worst=rows * num_slots),
            "thresholds": _parts(high=rows * num_slots, low=rows * num_slots),
            "work": _parts(x=rows * num_lists * size, carries=rows * num_carries * size, y=rows * candidates),
            "table": _parts(**dict.fromkeys(TABLES, num_seqs + 1)),
            "intervals": _parts(evict=rows * num_keys, start=rows * num_keys, end=rows * num_keys),
        }
        self.indexed = stride < INDEXED_STRIDE
        self.scan: list[Launch] = []
        y_stride, x_stride, c_stride = candidates, num_lists * size, num_carries * size
        unread = ("size",) * 5
        cu, slot_table, tile_table, block_table, list_table = ("cu", *TABLES) if packed else unread
        scores, base, heads = shape.strides, geometry.candidate_base, shape.heads

        def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
            self.scan.append(Launch(kernel, grid, arguments, constants))

        if packed:
            launch(
                sequence_table, (1,), "cu", *TABLES, num_seqs, window, stride, tile, BLOCK=block, N=1024
            )  # fmt: skip
        if num_blocks:
            launch(
                sort_blocks, (num_blocks, rows),
                "scores", "y", cu, block_table, num_seqs, base, candidates, heads, window, stride, y_stride, *scores,
                BLOCK=block, PACKED=packed, num_warps=plan.sort_warps,
            )  # fmt: skip
        shared = {
            "LOG_SIZE": size.bit_length() - 1,
            "PACKED": packed,
            "num_warps": plan.scan_warps,
        }
        if num_lists:
            launch(
                scan_groups, (num_groups, rows),
                "scores", "y", "x", cu, list_table, num_seqs, num_lists, pool, heads, y_stride, x_stride, *scores,
                plan.group, LOG_BLOCK=block.bit_length() - 1, STATE=state, **shared,
            )  # fmt: skip
        if num_carries:
            launch(
                scan_carries, (rows,),
                "x", "carries", list_table, num_seqs, num_groups, x_stride, c_stride, plan.group, **shared,
            )  # fmt: skip
            launch(
                add_carries, (num_lists - plan.group, rows),
                "x", "carries", list_table, num_seqs, x_stride, c_stride, plan.group, **shared,
            )  # fmt: skip
        if num_slots:
            lead = 0 if packed else -geometry.slot_of(0) % plan.slots
            launch(
                walk, (-(-(num_slots + lead) // plan.slots), rows),
                "y", "x", "best", "worst", "high", "low", "size", "lists", cu, slot_table, tile_table, list_table,
                num_seqs, num_slots, shape.num_tiles, base, candidates, geometry.first_candidate,
                geometry.first_refresh, topk, pool, window, stride, tile // stride, y_stride, x_stride,
                plan.slots, lead,
                LOG_SIZE=size.bit_length() - 1, BLOCK=block, TOPK=max(16, _power_of_2(topk)), PACKED=packed,
                STATE=state, HARD=shape.hard, INDEXED=self.indexed,
                num_warps=plan.walk_warps, maxnreg=plan.walk_registers,
            )  # fmt: skip
        self.intervals = Launch(
            intervals, (-(-num_keys // 512), rows),
            (
                "scores", "best", "worst", "high", "low", "evict", "start", "end", cu, slot_table,
                num_seqs, num_keys, num_slots, pool, geometry.token_base, base, geometry.past, geometry.s,
                geometry.first_refresh, heads, window, stride, max(num_slots, num_seqs).bit_length(), *scores,
            ),
            {"BLOCK": 512, "PACKED": packed, "STATE": state, "INDEXED": self.indexed, "num_warps": 4},
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
        bounds = empty(2, *rows, slots, dtype=torch.int32 if self.indexed else torch.int64)
        work = empty(self.storage["work"][-1][2], dtype=torch.int64)
        buffers: dict[str, Any] = {"scores": scores, "size": sizes, "lists": lists}
        self._add(buffers, "bounds", bounds)
        self._add(buffers, "thresholds", thresholds)
        self._add(buffers, "work", work)
        if cu_seqlens is not None:
            lists.fill_(-1)
            buffers["cu"] = cu_seqlens
            self._add(buffers, "table", empty(4, cu_seqlens.numel(), dtype=torch.int32))
        for launch in self.scan:
            launch(buffers)
        pool = self._last_pool(work).unflatten(0, rows) if want_pool else work.new_empty(0)
        for name, *_ in self.storage["work"]:
            del buffers[name]
        del work  # its memory serves the intervals
        intervals = empty(3, *rows, shape.num_keys, dtype=torch.int32)
        self._add(buffers, "intervals", intervals)
        self.intervals(buffers)
        return thresholds, sizes, lists, intervals, pool

    def _add(self, buffers: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
        """The buffers that share one tensor: views for Triton to compile with; addresses once it has, which cost the
        host less."""
        if self.intervals.compiled:
            start, size = tensor.data_ptr(), tensor.element_size()
            for part, first, _ in self.storage[name]:
                buffers[part] = start + first * size
        else:
            flat = tensor.view(-1)
            for part, first, last in self.storage[name]:
                buffers[part] = flat[first:last]

    def _last_pool(self, work: torch.Tensor) -> torch.Tensor:
        """Pool keys [rows, pool] of the last slot of an unpacked call."""
        geometry = self.shape.geometry
        (_, _, x_end), _, (_, y_first, y_end) = self.storage["work"]
        best_before = work[:x_end].view(self.x_shape)
        sorted_blocks = work[y_first:y_end].view(self.y_shape)
        offered = geometry.offered(geometry.num_slots - 1)
        block = max(-(-offered // self.block) - 1, 0)
        before = block - 1 + int(geometry.stateful)
        parts = [sorted_blocks[:, block * self.block : offered]]
        if before >= 0:
            parts.append(best_before[:, before])
        keys = torch.cat(parts, dim=1)
        keys = torch.nn.functional.pad(keys, (0, max(0, geometry.pool - keys.shape[1])), value=EMPTY)
        return keys.sort(dim=1, descending=True).values[:, : geometry.pool]


def _parts(**counts: int) -> list[tuple[str, int, int]]:
    """(name, first, last) of buffers that lie one after the other, from their numbers of elements."""
    parts, first = [], 0
    for name, count in counts.items():
        parts.append((name, first, first + count))
        first += count
    return parts


remembered_call = lru_cache(maxsize=CALLS)(Call)


def _op(
    extended: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    past: int,
    s: int,
    topk: int,
    window: int,
    stride: int,
    pool: int,
    stateful: bool,
    hard: bool,
    want_pool: bool,
) -> tuple[torch.Tensor, ...]:
    shape = _shape(extended, cu_seqlens, past, s, topk, window, stride, pool, stateful, hard)
    return remembered_call(shape).run(extended, cu_seqlens, want_pool)


def _shape(extended, cu_seqlens, past, s, topk, window, stride, pool, stateful, hard) -> Shape:
    b, num_keys, heads = extended.shape
    return Shape(
        device=extended.device,
        b=b,
        num_keys=num_keys,
        heads=heads,
        strides=extended.stride(),
        aligned=tuple(x.data_ptr() % 16 == 0 for x in (extended, cu_seqlens) if x is not None),
        num_seqs=None if cu_seqlens is None else cu_seqlens.numel() - 1,
        topk=topk,
        hard=hard,
        geometry=Geometry(past=past, s=s, window=window, stride=stride, pool=pool, stateful=stateful),
    )


def _fake(extended, cu_seqlens, past, s, topk, window, stride, pool, stateful, hard, want_pool):
    b, num_keys, heads = extended.shape
    tile = list_tile(stride)
    if cu_seqlens is None:
        geometry = Geometry(past=past, s=s, window=window, stride=stride, pool=pool, stateful=stateful)
        slots, tiles = geometry.num_slots, geometry.num_tiles
    else:
        num_seqs = cu_seqlens.shape[0] - 1
        slots, tiles = num_keys // stride + num_seqs, num_keys // tile + num_seqs
    return (
        extended.new_empty((2, b, heads, slots), dtype=torch.float32),
        extended.new_empty((b, heads, slots), dtype=torch.int32),
        extended.new_empty((b, heads, tiles, topk), dtype=torch.int32),
        extended.new_empty((3, b, heads, num_keys), dtype=torch.int32),
        extended.new_empty((b, heads, pool) if want_pool else (0,), dtype=torch.int64),
    )


_LIBRARY = torch.library.Library("sparsek", "FRAGMENT")
_LIBRARY.define(
    "select(Tensor extended, Tensor? cu_seqlens, SymInt past, SymInt s, int topk, int window, int stride, int pool, "
    "bool stateful, bool hard, bool want_pool) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("select", _op, "CompositeExplicitAutograd")
torch.library.register_fake("sparsek::select", _fake, lib=_LIBRARY)


def select_triton(
    scores: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    *,
    topk: int,
    geometry: Geometry,
    hard: bool,
    state: SelectionState | None,
    return_state: bool,
) -> Selection:
    """`select` by kernels; arguments checked by the caller."""
    extended = extend_scores(scores, state)
    thresholds, size, lists, intervals, pool_keys = torch.ops.sparsek.select(
        extended,
        cu_seqlens,
        geometry.past,
        geometry.s,
        topk,
        geometry.window,
        geometry.stride,
        geometry.pool,
        geometry.stateful,
        hard,
        return_state,
    )
    high, low = thresholds.unbind(0)
    evict, start, end = intervals.unbind(0)
    after = None
    if return_state:
        tau = join(high[..., -1], low[..., -1])
        after = next_state(extended, pool_keys, tau, geometry, state)
    return Selection(
        threshold=high,
        threshold_low=low,
        evict=evict,
        lists=lists,
        fraction_start=start,
        fraction_end=end,
        fraction_size=size,
        topk=topk,
        window=geometry.window,
        stride=geometry.stride,
        pool=geometry.pool,
        cu_seqlens=cu_seqlens,
        state=after,
        past=geometry.past,
    )
