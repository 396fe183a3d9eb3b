# SPDX-License-Identifier: Apache-2.0
"""Sizes of one attention call: tile shapes per architecture, and how query tiles map to packed sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from sparsek_kernels.attention.tile import GATE_CODE
from sparsek_kernels.launch import Launch, Named, Pass
from sparsek_kernels.selection.plan import power_of_2
from sparsek_kernels.selection.types import Selection, list_tile

LOG2E = 1.4426950408889634
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
MAX_GROUP = 64
SEGMENT_QUERIES = 1024  # least queries per segment of the key-major backward


@dataclass(frozen=True)
class Tiling:
    """rows: query heads x queries per tile; keys: keys per block. A kernel's inner product is [rows, keys, d].

    band: keys per block and stages of the local band in the forward kernel of uniform tiles, where they differ.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    band: tuple[int, int] | None = None
    queries: int = 0  # rows / padded heads, filled in by the plan

    @property
    def launch(self) -> dict[str, int]:
        """Compiler options of a launch, with the tile's extent."""
        options = {
            "QUERIES": self.queries,
            "KEYS": self.keys,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


@dataclass(frozen=True)
class Tilings:
    forward: Tiling
    backward_query: Tiling
    backward_survivors: Tiling
    backward_band: Tiling


@dataclass(frozen=True)
class Part:
    """Query heads of every group that the query-major kernels take in one launch: `heads` of them, from `first` on."""

    first: int
    heads: int
    forward: Tiling
    backward_query: Tiling

    @property
    def launch(self) -> dict[str, int]:
        """Compile-time arguments of a launch."""
        return {"FIRST": self.first, "LAST": self.first + self.heads, "HEADS_PAD": power_of_2(self.heads)}


# 16-bit inputs by padded head dimension. Measured on Hopper (kernels/benchmarks/README.md).
HOPPER = {
    64: Tilings(Tiling(128, 64, 4, 3), Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2)),
    128: Tilings(
        Tiling(128, 32, 4, 4, band=(64, 2)), Tiling(64, 32, 4, 3), Tiling(32, 64, 4, 2), Tiling(32, 64, 4, 2)
    ),
    256: Tilings(Tiling(64, 64, 4, 2), Tiling(64, 64, 8, 1), Tiling(32, 64, 8, 1), Tiling(32, 64, 8, 1)),
}
# Unmeasured: conservative in shared memory and registers (Ampere, Blackwell and anything newer).
CONSERVATIVE = {
    64: Tilings(Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2), Tiling(32, 64, 4, 2), Tiling(32, 64, 4, 2)),
    128: Tilings(Tiling(64, 64, 4, 2), Tiling(64, 32, 4, 2), Tiling(32, 64, 4, 1), Tiling(32, 64, 4, 1)),
    256: Tilings(Tiling(64, 32, 4, 1), Tiling(32, 32, 4, 1), Tiling(16, 32, 4, 1), Tiling(16, 32, 4, 1)),
}
# fp32 inputs use exact (non-tensor-core) products; small tiles keep registers from spilling.
FULL_PRECISION = {
    dim: Tilings(Tiling(32, 32, 4, 1), Tiling(32, 32, 4, 1), Tiling(16, 32, 4, 1), Tiling(16, 32, 4, 1))
    for dim in (64, 128, 256)
}


_installed: dict[tuple[torch.device, torch.dtype, int], Tilings] = {}


def install_tilings(device: torch.device, dtype: torch.dtype, dim_pad: int, tilings: Tilings | None) -> None:
    """Tile shapes of this process from now on, in place of the tables; None restores them (`tune.py` finds some)."""
    _installed.pop((device, dtype, dim_pad), None)
    if tilings is not None:
        _installed[device, dtype, dim_pad] = tilings


def tilings_for(device: torch.device, dtype: torch.dtype, dim_pad: int) -> Tilings:
    return _installed.get((device, dtype, dim_pad)) or _table(device, dtype, dim_pad)


@lru_cache(maxsize=64)
def _table(device: torch.device, dtype: torch.dtype, dim_pad: int) -> Tilings:
    if dtype == torch.float32:
        return FULL_PRECISION[dim_pad]
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
        return HOPPER[dim_pad]
    return CONSERVATIVE[dim_pad]


def padded_dim(dim: int) -> int:
    """Head dimension as the kernels' tiles have it: a power of two, at least 64."""
    return max(64, 1 << (dim - 1).bit_length())


def cut_group(group: int) -> tuple[tuple[int, int], ...]:
    """(first head, heads) of a group's parts. A tile has a power of two of rows to a query: a part leaves at most an
    eighth of them empty, where all of a group would leave up to a half."""
    parts, first = [], 0
    while first < group:
        heads = group - first
        if 8 * heads < 7 * power_of_2(heads):
            heads = power_of_2(heads) // 2
        parts.append((first, heads))
        first += heads
    return tuple(parts)


def fit(tiling: Tiling, heads: int, stride: int) -> Tiling:
    """The tile's extent in queries: its rows shared by `heads`, halved once if that keeps a tile inside one refresh
    point."""
    queries = max(tiling.rows // heads, 1)
    if list_tile(stride) == stride and stride % queries and stride % (queries // 2 or 1) == 0:
        queries //= 2
    return replace(tiling, rows=queries * heads, queries=queries)


@lru_cache(maxsize=256)
def parts_of(tilings: Tilings, group: int, stride: int) -> tuple[Part, ...]:
    """The parts of a group of `group` query heads, each with its tiles."""
    return tuple(
        Part(
            first,
            heads,
            fit(tilings.forward, power_of_2(heads), stride),
            fit(tilings.backward_query, power_of_2(heads), stride),
        )
        for first, heads in cut_group(group)
    )


class AttentionPlan:
    """Everything the launchers need besides the tensors, derived from shapes and settings, and the launches themselves.

    query     shape [b, s, hq, d]
    keys      (E, hkv) of keys and values
    num_seqs  packed sequences, None where unpacked
    device    of all tensors: launches are for one
    """

    def __init__(
        self,
        query: torch.Size,
        keys: torch.Size,
        dtype: torch.dtype,
        num_seqs: int | None,
        topk: int,
        window: int,
        stride: int,
        pool: int,
        past: int,
        gate: str,
        softmax_scale: float,
        tilings: Tilings,
        device: torch.device,
    ) -> None:
        self.batch, self.tokens, heads, self.dim = query
        self.keys, self.kv_heads = keys
        self.group = heads // self.kv_heads
        self.dim_pad = padded_dim(self.dim)
        self.topk, self.window, self.stride, self.gate = topk, window, stride, gate
        self.scale, self.scale_log2 = softmax_scale, softmax_scale * LOG2E
        self.floor = 1.0 / (pool - topk + 1)  # no selected gate is below this (kernels/README.md)
        self.past, self.carried = past, self.keys - self.tokens
        self.num_seqs, self.packed = num_seqs, num_seqs is not None
        self.list_tile = list_tile(stride)
        self.full_precision = dtype == torch.float32
        # Partials take (topk + capacity) / segment rows per key; longer segments mean fewer and longer programs.
        self.segment = self.list_tile * -(-max(SEGMENT_QUERIES, 2 * topk) // self.list_tile)
        self.capacity = self.segment // 4
        self.parts = parts_of(tilings, self.group, stride)
        self.backward_survivors = fit(tilings.backward_survivors, 1, stride)
        band = tilings.backward_band  # a tile must not reach over a key block's diagonal: queries <= keys
        self.backward_band = fit(replace(band, rows=min(band.rows, band.keys)), 1, stride)
        self._passes: dict[Callable, Pass] = {}

    def run(self, make: Callable[[AttentionPlan, Named], list[Launch]], buffers: Named) -> None:
        """Run the kernels that `make` launches for this plan, whose shapes and device the buffers have."""
        kernels = self._passes.get(make)
        if kernels is None:
            kernels = self._passes[make] = Pass(make)
        kernels(self, buffers)

    def uniform(self, tiling: Tiling) -> bool:
        """Whether all queries of a tile share one refresh point."""
        return self.list_tile == self.stride and self.stride % tiling.queries == 0

    def constants(self, tiling: Tiling) -> dict[str, object]:
        """Compile-time arguments every attention kernel takes."""
        return {
            "TOPK": self.topk,
            "WINDOW": self.window,
            "STRIDE": self.stride,
            "LIST_TILE": self.list_tile,
            "GATE": GATE_CODE[self.gate],
            "GROUP": self.group,
            "D": self.dim,
            "D_PAD": self.dim_pad,
            "UNIFORM": self.uniform(tiling),
            "PACKED": self.packed,
            "IEEE": self.full_precision,
        }

    def num_tiles(self, size: int) -> int:
        """Tiles of `size` tokens that restart per sequence; their static capacity when packed, so nothing waits for
        the device."""
        if self.num_seqs is None:
            return -(-(self.past % size + self.tokens) // size)
        return self.tokens // size + self.num_seqs

    def tiles(self, size: int, cu_seqlens: torch.Tensor | None) -> torch.Tensor | None:
        """Tile table of `tile.sequence_tile` for tiles of `size` tokens, None where unpacked."""
        if cu_seqlens is None:
            return None
        bounds = cu_seqlens.long()
        starts, lengths = bounds[:-1], bounds[1:] - bounds[:-1]

        def before(unit: int) -> torch.Tensor:
            count = -(-lengths // unit)
            return torch.cumsum(count, 0) - count

        tile = torch.arange(self.num_tiles(size), device=bounds.device)
        tiles_before = before(size)
        # The last sequence that starts at or before the tile; empty sequences own no tile.
        sequence = torch.searchsorted(tiles_before + -(-lengths // size), tile, right=True)
        sequence = sequence.clamp(max=lengths.numel() - 1)
        first = starts[sequence] + (tile - tiles_before[sequence]) * size
        columns = (
            first,
            starts[sequence],
            bounds[1:][sequence],
            before(self.stride)[sequence],
            before(self.list_tile)[sequence],
            before(self.segment)[sequence],
        )
        return torch.stack(columns, dim=1).int()


_remembered = lru_cache(maxsize=256)(AttentionPlan)


def plan_for(
    query: torch.Tensor,
    key: torch.Tensor,
    selection: Selection,
    *,
    gate: str,
    softmax_scale: float,
    tilings: Tilings | None = None,
) -> AttentionPlan:
    """The plan of a call; one that repeats gets the plan of before, whose launches cost the host less.

    query [b, s, hq, d]; key [b, E, hkv, d]
    """
    cu_seqlens = selection.cu_seqlens
    return _remembered(
        query.shape,
        key.shape[1:3],
        query.dtype,
        None if cu_seqlens is None else cu_seqlens.numel() - 1,
        selection.topk,
        selection.window,
        selection.stride,
        selection.pool,
        selection.past,
        gate,
        softmax_scale,
        tilings or tilings_for(query.device, query.dtype, padded_dim(query.shape[-1])),
        query.device,
    )
