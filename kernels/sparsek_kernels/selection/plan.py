# SPDX-License-Identifier: Apache-2.0
"""Sizes of one selection call on the GPU: launch shapes, and what they follow from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .geometry import Geometry
from .types import list_tile


@dataclass(frozen=True)
class Plan:
    """Launch shapes. They change speed and memory, never a bit of the result. All but `slots` are powers of two.

    block            candidates per block
    group, chunk     lists per group of the scan, and keys per program of it
    slots            refresh slots per program of the walk
    lanes            keys of a block that a slot looks at at a time
    interval_block   keys per program of the intervals
    *_warps          warps per program
    walk_registers   most registers per thread of the walk: fewer mean more programs at a time
    """

    block: int
    group: int
    chunk: int
    slots: int
    lanes: int
    interval_block: int
    sort_warps: int
    scan_warps: int
    merge_warps: int
    walk_warps: int
    walk_registers: int
    interval_warps: int


def power_of_2(n: int) -> int:
    """Smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def make_plan(candidates: int, slots: int, rows: int, pool: int) -> Plan:
    """Shapes for about `candidates` candidates and `slots` slots in each of `rows` rows."""
    size = power_of_2(pool)
    block = min(max(size // 4, 256), 2048)
    lists = max(1, candidates // block)
    return Plan(
        block=block,
        group=8,
        chunk=128,
        slots=min(32, power_of_2(-(-rows * slots // (132 * 64)))),
        lanes=128,
        interval_block=256,
        sort_warps=max(1, block // 512) if rows * lists > 132 * 8 else min(block // 32, 32),
        scan_warps=4,
        merge_warps=min(max(size // 256, 4), 16),
        walk_warps=1,
        walk_registers=96,
        interval_warps=4,
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


def scan_levels(lists: int, group: int) -> list[int]:
    """Lists of each level of the scan (`scan_kernels.py`): one for each group of the level below but the last, as
    long as they are more than one (the only one needs no scan)."""
    levels = [lists]
    while -(-levels[-1] // group) > 2:
        levels.append(-(-levels[-1] // group) - 1)
    return levels
