# SPDX-License-Identifier: Apache-2.0
"""`select` by kernels: the custom op `sparsek::select`, its fake kernel for `torch.compile`, and the public result."""

from __future__ import annotations

import torch

from .call import remembered_call
from .geometry import Geometry
from .plan import Shape
from .threshold import join
from .torch_backend import extend_scores, next_state
from .types import Selection, SelectionState, list_tile


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
        after = next_state(extended, pool_keys, tau, topk, geometry, state)
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
