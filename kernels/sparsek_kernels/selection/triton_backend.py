# SPDX-License-Identifier: Apache-2.0
"""Launches the selection kernels. Grids and buffers depend on shapes only, so the host never waits for the device.

Transient bytes per candidate and row: 8 (Y) + 8 SIZE / BLOCK (X) + 8 SIZE / (BLOCK GROUP) (carries), and 24 per slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch

from .geometry import Geometry
from .interval_kernel import intervals
from .prefix_kernels import add_carries, scan_carries, scan_groups, sequence_table, sort_blocks
from .torch_backend import EMPTY, extend_scores, next_state
from .types import Selection, SelectionState, list_tile
from .walk_kernel import walk


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
class Outputs:
    """What the kernels write, rows = b * hkv first: the fields of `Selection`, then Y and X for `last_pool`."""

    high: torch.Tensor
    low: torch.Tensor
    evict: torch.Tensor
    lists: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    size: torch.Tensor
    tau: torch.Tensor
    sorted_blocks: torch.Tensor
    best_before: torch.Tensor
    plan: Plan


def run_kernels(
    extended: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    *,
    topk: int,
    geometry: Geometry,
    hard: bool,
    plan: Plan | None = None,
) -> Outputs:
    """All kernels of one call. extended [b, E, hkv] float32."""
    b, num_keys, heads = extended.shape
    rows, device = b * heads, extended.device
    window, stride, pool = geometry.window, geometry.stride, geometry.pool
    tile = list_tile(stride)
    packed, state = cu_seqlens is not None, int(geometry.stateful)
    if cu_seqlens is not None:
        num_seqs = cu_seqlens.numel() - 1
        num_slots = num_keys // stride + num_seqs
        num_tiles = num_keys // tile + num_seqs
        candidates = num_keys
    else:
        num_seqs = 1
        num_slots, num_tiles = geometry.num_slots, geometry.num_tiles
        candidates = geometry.offered(num_slots - 1)
    plan = plan or make_plan(candidates, num_slots, rows, pool)
    size = max(16, _power_of_2(pool))
    log_size = size.bit_length() - 1
    block = plan.block
    if packed:
        num_blocks, num_lists = num_keys // block + num_seqs, num_keys // block
    else:
        num_blocks = -(-candidates // block)
        num_lists = max(num_blocks, 1) - 1 + state
    num_groups = -(-num_lists // plan.group)
    width = num_keys if packed else candidates

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    y = empty(rows, width, dtype=torch.int64)
    x = empty(rows, num_lists, size, dtype=torch.int64)
    carries = empty(rows, num_groups if num_groups > 1 else 0, size, dtype=torch.int64)
    best, worst = (empty(rows, num_slots, dtype=torch.int64) for _ in range(2))
    tau = empty(rows, num_slots, dtype=torch.float64)
    high, low = (empty(rows, num_slots, dtype=torch.float32) for _ in range(2))
    count = empty(rows, num_slots, dtype=torch.int32)
    evict, start, end = (empty(rows, num_keys, dtype=torch.int32) for _ in range(3))
    if packed:
        lists = torch.full((rows, num_tiles, topk), -1, dtype=torch.int32, device=device)
        table = empty(4, num_seqs + 1, dtype=torch.int32)
        cu, slot_table, tile_table, block_table, list_table = (cu_seqlens, *table.unbind(0))
        sequence_table[(1,)](
            cu,
            slot_table,
            tile_table,
            block_table,
            list_table,
            num_seqs,
            window,
            stride,
            tile,
            BLOCK=block,
            N=1024,
        )
    else:
        lists = empty(rows, num_tiles, topk, dtype=torch.int32)
        cu = slot_table = tile_table = block_table = list_table = count  # never read
    strides = extended.stride()
    y_stride, x_stride, c_stride = y.stride(0), x.stride(0), carries.stride(0)
    base = geometry.candidate_base
    if num_blocks:
        sort_blocks[(num_blocks, rows)](
            extended,
            y,
            cu,
            block_table,
            num_seqs,
            base,
            candidates,
            heads,
            window,
            stride,
            y_stride,
            *strides,
            BLOCK=block,
            PACKED=packed,
            num_warps=plan.sort_warps,
        )
    if num_lists:
        shared = {"GROUP": plan.group, "LOG_SIZE": log_size, "PACKED": packed, "num_warps": plan.scan_warps}
        scan_groups[(num_groups, rows)](
            extended,
            y,
            x,
            cu,
            list_table,
            num_seqs,
            num_lists,
            pool,
            heads,
            y_stride,
            x_stride,
            *strides,
            LOG_BLOCK=block.bit_length() - 1,
            STATE=state,
            **shared,
        )
        if num_groups > 1:
            scan_carries[(rows,)](x, carries, list_table, num_seqs, num_groups, x_stride, c_stride, **shared)
            add_carries[(num_lists - plan.group, rows)](
                x, carries, list_table, num_seqs, x_stride, c_stride, **shared
            )
    if num_slots:
        lead = 0 if packed else -geometry.slot_of(0) % plan.slots
        walk[(-(-(num_slots + lead) // plan.slots), rows)](
            y,
            x,
            best,
            worst,
            tau,
            high,
            low,
            count,
            lists,
            cu,
            slot_table,
            tile_table,
            list_table,
            num_seqs,
            num_slots,
            num_tiles,
            base,
            candidates,
            geometry.first_candidate,
            geometry.first_refresh,
            topk,
            pool,
            window,
            stride,
            tile // stride,
            y_stride,
            x_stride,
            plan.slots,
            lead,
            LOG_SIZE=log_size,
            BLOCK=block,
            TOPK=max(16, _power_of_2(topk)),
            PACKED=packed,
            STATE=state,
            HARD=hard,
            num_warps=plan.walk_warps,
            maxnreg=plan.walk_registers,
        )
    intervals[(-(-num_keys // 512), rows)](
        extended,
        best,
        worst,
        tau,
        evict,
        start,
        end,
        cu,
        slot_table,
        num_seqs,
        num_keys,
        num_slots,
        pool,
        geometry.token_base,
        base,
        geometry.past,
        geometry.s,
        geometry.first_refresh,
        heads,
        window,
        stride,
        max(num_slots, num_seqs).bit_length(),
        *strides,
        BLOCK=512,
        PACKED=packed,
        STATE=state,
        num_warps=4,
    )
    return Outputs(high, low, evict, lists, start, end, count, tau, y, x, plan)


def last_pool(outputs: Outputs, geometry: Geometry) -> torch.Tensor:
    """Pool keys [rows, pool] of the last slot of an unpacked call."""
    offered = geometry.offered(geometry.num_slots - 1)
    size = outputs.plan.block
    block = max(-(-offered // size) - 1, 0)
    before = block - 1 + int(geometry.stateful)
    parts = [outputs.sorted_blocks[:, block * size : offered]]
    if before >= 0:
        parts.append(outputs.best_before[:, before])
    keys = torch.cat(parts, dim=1)
    keys = torch.nn.functional.pad(keys, (0, max(0, geometry.pool - keys.shape[1])), value=EMPTY)
    return keys.sort(dim=1, descending=True).values[:, : geometry.pool]


_FIELDS = ("high", "low", "evict", "lists", "start", "end", "size")


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
    geometry = Geometry(past=past, s=s, window=window, stride=stride, pool=pool, stateful=stateful)
    outputs = run_kernels(extended, cu_seqlens, topk=topk, geometry=geometry, hard=hard)
    shape = (extended.shape[0], extended.shape[2])
    kept = tuple(getattr(outputs, name).unflatten(0, shape) for name in _FIELDS)
    if not want_pool:
        return (*kept, extended.new_empty(0, dtype=torch.int64), extended.new_empty(0, dtype=torch.float64))
    return (
        *kept,
        last_pool(outputs, geometry).unflatten(0, shape),
        outputs.tau[:, -1].clone().unflatten(0, shape),
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

    def new(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return extended.new_empty((b, heads, *shape), dtype=dtype)

    kept = (
        new(torch.float32, slots),
        new(torch.float32, slots),
        new(torch.int32, num_keys),
        new(torch.int32, tiles, topk),
        new(torch.int32, num_keys),
        new(torch.int32, num_keys),
        new(torch.int32, slots),
    )
    if not want_pool:
        return (*kept, extended.new_empty(0, dtype=torch.int64), extended.new_empty(0, dtype=torch.float64))
    return (*kept, new(torch.int64, pool), new(torch.float64))


_LIBRARY = torch.library.Library("sparsek", "FRAGMENT")
_LIBRARY.define(
    "select(Tensor extended, Tensor? cu_seqlens, SymInt past, SymInt s, int topk, int window, int stride, int pool, "
    "bool stateful, bool hard, bool want_pool) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
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
    *kept, pool_keys, tau = torch.ops.sparsek.select(
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
    high, low, evict, lists, start, end, size = kept
    after = None
    if return_state:
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
