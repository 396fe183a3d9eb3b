# SPDX-License-Identifier: Apache-2.0
"""Selection in torch: vectorised over rows, one step per refresh point. The reference for the Triton kernels.

A *row* is one (batch, KV head) pair. A key is one int64 that orders scores descending and ties to the lower index:
the order-preserving integer image of the float32 score in the high word, the complement of the index in the low word.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from .geometry import Geometry
from .threshold import exact_threshold, split
from .types import Selection, SelectionState, list_tile

EMPTY = -(1 << 63)
_LOW = (1 << 31) - 1
_SLOTS_AT_ONCE = 64


def make_keys(scores: torch.Tensor) -> torch.Tensor:
    """[..., E] float32 -> int64 keys; -inf becomes EMPTY; -0.0 ties with +0.0."""
    bits = (scores + 0.0).view(torch.int32)
    order = (bits ^ ((bits >> 31) & _LOW)).long()
    index = torch.arange(scores.shape[-1], device=scores.device)
    return torch.where(scores == float("-inf"), EMPTY, (order << 32) | (_LOW - index))


def key_scores(keys: torch.Tensor) -> torch.Tensor:
    """Scores of keys, -inf where empty."""
    order = (keys >> 32).int()
    scores = (order ^ ((order >> 31) & _LOW)).view(torch.float32)
    return torch.where(keys == EMPTY, float("-inf"), scores)


def key_indices(keys: torch.Tensor) -> torch.Tensor:
    """Indices of keys (int64), -1 where empty."""
    return torch.where(keys == EMPTY, -1, _LOW - (keys & 0xFFFFFFFF))


def extend_scores(scores: torch.Tensor, state: SelectionState | None) -> torch.Tensor:
    """Scores of all E keys, [b, E, hkv]: carried pool, recent tokens, this call's tokens."""
    if state is None:
        return scores
    carried = torch.cat([state.pool_scores, state.recent_scores], dim=-1).transpose(1, 2)
    return torch.cat([carried, scores], dim=1)


def _row_keys(extended: torch.Tensor) -> torch.Tensor:
    return make_keys(extended.transpose(1, 2).flatten(0, 1).contiguous())


def walk_pools(keys: torch.Tensor, geometry: Geometry) -> Iterator[torch.Tensor]:
    """Pool keys [rows, pool] of each slot in turn, sorted descending."""
    pool = keys.new_full((keys.shape[0], geometry.pool), EMPTY)
    if geometry.stateful:
        pool = keys[:, : geometry.pool]
    seen = 0
    for slot in range(geometry.num_slots):
        offered = geometry.offered(slot)
        if offered > seen:
            base = geometry.candidate_base
            merged = torch.cat([pool, keys[:, base + seen : base + offered]], dim=1)
            pool = merged.sort(dim=1, descending=True).values[:, : geometry.pool]
            seen = offered
        yield pool


def _pools_by_chunk(keys: torch.Tensor, geometry: Geometry) -> Iterator[torch.Tensor]:
    chunk: list[torch.Tensor] = []
    for pool in walk_pools(keys, geometry):
        chunk.append(pool)
        if len(chunk) == _SLOTS_AT_ONCE:
            yield torch.stack(chunk, dim=1)
            chunk = []
    if chunk:
        yield torch.stack(chunk, dim=1)


def _first(predicate, start: torch.Tensor, stop: int) -> torch.Tensor:
    """Smallest slot in [start, stop) where a monotone predicate holds, else `stop`, elementwise by bisection."""
    lo, hi = start.clamp(max=stop), torch.full_like(start, stop)
    for _ in range(max(1, stop).bit_length()):
        middle = (lo + hi) // 2
        holds = predicate(middle.clamp(max=stop - 1))
        active = lo < hi
        hi = torch.where(active & holds, middle, hi)
        lo = torch.where(active & ~holds, middle + 1, lo)
    return lo


def _arrivals(geometry: Geometry, device: torch.device) -> torch.Tensor:
    """Slot at which each of the E keys enters the pool ([E] int64); num_slots or more for "not in this call"."""
    index = torch.arange(geometry.num_keys, device=device)
    position = index - geometry.token_base + geometry.past
    arrival = -(-(position + geometry.window) // geometry.stride) - geometry.first_refresh
    if geometry.stateful:
        arrival = torch.where(index < geometry.pool, 0, arrival)
    return arrival.clamp(min=0)


def _intervals(keys, extended_rows, arrival, best, worst, tau, geometry: Geometry):
    """evict, fraction_start, fraction_end ([rows, E] int64) from the monotone boundaries of all slots ([rows, R])."""
    slots = geometry.num_slots
    arrival = arrival.expand_as(keys)
    u = extended_rows.double()
    unselected = _first(lambda r: best.gather(1, r) > keys, arrival, slots)
    evict = (geometry.first_refresh + unselected) * geometry.stride - geometry.past
    evict = evict.clamp(min=0, max=geometry.s)
    start = _first(lambda r: u - tau.gather(1, r) < 1.0, arrival, slots)
    end = _first(lambda r: (u - tau.gather(1, r) <= 0.0) | (worst.gather(1, r) > keys), arrival, slots)
    start = torch.minimum(start, end)
    if geometry.stateful:
        # Recent tokens that were offered before live on in the pool part, or nowhere.
        index = torch.arange(geometry.num_keys, device=keys.device)
        dead = (keys == EMPTY) | ((index >= geometry.pool) & (index < geometry.candidate_base))
        evict, start, end = (torch.where(dead, 0, x) for x in (evict, start, end))
    return evict, start, end


def select_rows(
    scores: torch.Tensor,
    *,
    topk: int,
    geometry: Geometry,
    hard: bool,
    state: SelectionState | None,
    return_state: bool,
) -> Selection:
    """`select` for one unpacked call; arguments checked by the caller."""
    b, _, heads = scores.shape
    extended = extend_scores(scores, state)
    keys = _row_keys(extended)
    rows = keys.shape[0]
    tile_slots = {geometry.tile_slot(tile): tile for tile in range(geometry.num_tiles)}
    lists = torch.full((rows, geometry.num_tiles, topk), -1, dtype=torch.int32, device=scores.device)
    best, worst, taus, sizes = [], [], [], []
    pool = keys[:, : geometry.pool] if geometry.stateful else keys.new_full((rows, geometry.pool), EMPTY)
    slot = 0
    for pools in _pools_by_chunk(keys, geometry):  # [rows, slots, pool]
        u = key_scores(pools)
        tau = exact_threshold(u, geometry.pool if hard else topk)
        distance = u.double() - tau.unsqueeze(-1)
        sizes.append(((distance > 0.0) & (distance < 1.0)).sum(-1))
        taus.append(tau)
        best.append(pools[..., topk - 1])
        worst.append(pools[..., -1])
        for r in range(pools.shape[1]):
            if slot + r in tile_slots:
                lists[:, tile_slots[slot + r]] = key_indices(pools[:, r, :topk]).int()
        slot += pools.shape[1]
        pool = pools[:, -1]
    empty = keys.new_zeros(rows, 0)
    tau = torch.cat(taus, 1) if taus else empty.double()
    size = torch.cat(sizes, 1) if sizes else empty
    bounds = [torch.cat(x, 1) if x else empty for x in (best, worst)]
    arrival = _arrivals(geometry, keys.device)
    extended_rows = extended.transpose(1, 2).flatten(0, 1)
    evict, start, end = _intervals(keys, extended_rows, arrival, *bounds, tau, geometry)
    high, low = split(tau)

    def by_head(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x.to(dtype).unflatten(0, (b, heads))

    after = None
    if return_state:
        after = next_state(
            extended, by_head(pool, torch.int64), by_head(tau[:, -1], torch.float64), topk, geometry, state
        )
    return Selection(
        threshold=by_head(high, torch.float32),
        threshold_low=by_head(low, torch.float32),
        evict=by_head(evict, torch.int32),
        lists=by_head(lists, torch.int32),
        fraction_start=by_head(start, torch.int32),
        fraction_end=by_head(end, torch.int32),
        fraction_size=by_head(size, torch.int32),
        topk=topk,
        window=geometry.window,
        stride=geometry.stride,
        pool=geometry.pool,
        state=after,
        past=geometry.past,
    )


def next_state(
    extended: torch.Tensor,
    pool: torch.Tensor,
    tau: torch.Tensor,
    topk: int,
    geometry: Geometry,
    state: SelectionState | None,
) -> SelectionState:
    """State after the call. pool [b, hkv, pool] keys of the last slot, tau [b, hkv] float64.

    Copies: a view would keep the memory of the whole call.
    """
    index = key_indices(pool)
    position = index - geometry.token_base + geometry.past
    if state is not None:
        carried = state.pool_index.long().gather(-1, index.clamp(0, geometry.pool - 1))
        position = torch.where(index < geometry.pool, carried, position)
    recent = extended.transpose(1, 2)[..., geometry.pool if geometry.stateful else 0 :]
    recent = torch.nn.functional.pad(recent, (geometry.recent, 0), value=float("-inf"))[
        ..., -geometry.recent :
    ]
    return SelectionState(
        length=geometry.past + geometry.s,
        pool_scores=key_scores(pool),
        pool_index=torch.where(index < 0, -1, position).int(),
        recent_scores=recent.clone(memory_format=torch.contiguous_format),
        threshold=tau.clone(),
        topk=topk,
        window=geometry.window,
        stride=geometry.stride,
    )


def pool_rows(scores: torch.Tensor, *, geometry: Geometry, state: SelectionState | None) -> torch.Tensor:
    """Key indices of every slot's pool: [b, hkv, R, pool] int64, score descending, -1 past its end."""
    keys = _row_keys(extend_scores(scores, state))
    pools = [key_indices(pool) for pool in walk_pools(keys, geometry)]
    shape = (scores.shape[0], scores.shape[2])
    if not pools:
        return keys.new_zeros(*shape, 0, geometry.pool)
    return torch.stack(pools, dim=1).unflatten(0, shape)


def packed_slots(lengths: list[int], tile: int) -> list[int]:
    """First slot of each sequence, and the total, for slots of `tile` tokens."""
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + -(-length // tile))
    return offsets


def select_packed(
    scores: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    topk: int,
    window: int,
    stride: int,
    pool: int,
    hard: bool,
) -> Selection:
    """`select` for sequences packed along s (b = 1): each alone, placed at its slots and tokens."""
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    s, heads, device = scores.shape[1], scores.shape[2], scores.device
    tile = list_tile(stride)
    capacity = s // stride + len(lengths)
    slots, tiles = packed_slots(lengths, stride), packed_slots(lengths, tile)

    def full(*shape: int, value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((1, heads, *shape), value, dtype=dtype, device=device)

    threshold = full(capacity, value=float("inf"), dtype=torch.float32)
    low = full(capacity, value=0.0, dtype=torch.float32)
    size = full(capacity, value=0, dtype=torch.int32)
    lists = full(s // tile + len(lengths), topk, value=-1, dtype=torch.int32)
    evict, start, end = (full(s, value=0, dtype=torch.int32) for _ in range(3))
    for a, length in enumerate(lengths):
        if length == 0:
            continue
        first, last = bounds[a], bounds[a + 1]
        geometry = Geometry(past=0, s=length, window=window, stride=stride, pool=pool, stateful=False)
        one = select_rows(
            scores[:, first:last], topk=topk, geometry=geometry, hard=hard, state=None, return_state=False
        )
        here = slice(slots[a], slots[a + 1])
        threshold[..., here], low[..., here], size[..., here] = (
            one.threshold,
            one.threshold_low,
            one.fraction_size,
        )
        lists[:, :, tiles[a] : tiles[a + 1]] = torch.where(one.lists >= 0, one.lists + first, -1)
        evict[..., first:last] = one.evict + first
        start[..., first:last] = one.fraction_start + slots[a]
        end[..., first:last] = one.fraction_end + slots[a]
    return Selection(
        threshold=threshold,
        threshold_low=low,
        evict=evict,
        lists=lists,
        fraction_start=start,
        fraction_end=end,
        fraction_size=size,
        topk=topk,
        window=window,
        stride=stride,
        pool=pool,
        cu_seqlens=cu_seqlens,
    )


def pool_packed(
    scores: torch.Tensor, cu_seqlens: torch.Tensor, *, window: int, stride: int, pool: int
) -> torch.Tensor:
    """`pool_rows` for packed sequences; unused slots are -1."""
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    slots = packed_slots(lengths, stride)
    shape = (1, scores.shape[2], scores.shape[1] // stride + len(lengths), pool)
    out = torch.full(shape, -1, dtype=torch.int64, device=scores.device)
    for a, length in enumerate(lengths):
        if length:
            geometry = Geometry(past=0, s=length, window=window, stride=stride, pool=pool, stateful=False)
            one = pool_rows(scores[:, bounds[a] : bounds[a + 1]], geometry=geometry, state=None)
            out[:, :, slots[a] : slots[a + 1]] = torch.where(one >= 0, one + bounds[a], -1)
    return out
