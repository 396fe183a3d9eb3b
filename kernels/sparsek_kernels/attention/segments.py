# SPDX-License-Identifier: Apache-2.0
# Triton's language is not typed Python:
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
"""Bookkeeping of the key-major backward: which old keys each segment of queries attends to, and where partials go.

Cut each sequence into segments of SEGMENT queries (a multiple of the list tile). The older keys that a segment
attends to are its *list*, the keys selected at its start, and its *entrants*, the keys that leave the window
inside it and stay selected. Both get one row each in the partial buffers: a segment owns TOPK + CAPACITY rows,
list entries first.

- `index_segments_kernel` compacts the entrants, and links every list row to the row of the same key one segment
  earlier. The list is sorted by (score descending, index ascending), so that row is found by binary search.
- `collect_partials_kernel` sums each key's rows: the last row of a chain walks back along the links, then adds
  the key's entrant row, and keeps the total. KEY_ROW[j] names the row with key j's total, -1 if it has none.

A segment with more than CAPACITY entrants keeps none: its keys stay with the band pass, which is efficient exactly
when most keys of a block survive. Every row is written by one program; chains are disjoint: no atomics.
"""

import triton
import triton.language as tl

from sparsek_kernels.attention.tile import sequence_tile


@triton.jit
def leave_window(j, start, WINDOW: tl.constexpr, STRIDE: tl.constexpr):
    """First query for which key j is no longer local: the first refresh point at least WINDOW after it."""
    return start + (j - start + WINDOW + STRIDE - 1) // STRIDE * STRIDE


@triton.jit
def _rank_in_list(entries, u_base, count, u, j, TOPK: tl.constexpr):
    """Place of key (u, j) in a list sorted by (score descending, index ascending): entries strictly before it."""
    lo = j * 0
    hi = lo + count
    steps = TOPK
    while steps > 0:
        mid = (lo + hi) // 2
        open_ = lo < hi
        other = tl.load(entries + mid, mask=open_, other=0)
        other_u = tl.load(u_base + other)
        before = (other_u > u) | ((other_u == u) & (other < j))
        lo = tl.where(open_ & before, mid + 1, lo)
        hi = tl.where(open_ & ~before, mid, hi)
        steps = steps // 2
    return lo


@triton.jit
def index_segments_kernel(
    U, EVICT, LISTS, TILES, ENTRANTS, ENTRANT_COUNT, KEY_ROW, LINK,
    tokens, list_tiles, segments,
    TOPK: tl.constexpr, TOPK_PAD: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, LIST_TILE: tl.constexpr,
    SEGMENT: tl.constexpr, SEGMENT_PAD: tl.constexpr, CAPACITY: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid (segments, b * hkv). ENTRANTS [b * hkv, segments, CAPACITY], LINK [b * hkv, segments, TOPK] int32."""
    bh = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(0)
    first, start, end, _, list0, _ = sequence_tile(TILES, segment, tokens, SEGMENT, PACKED)
    if first >= end:
        return
    ROWS: tl.constexpr = TOPK + CAPACITY
    u_base = U + bh * tokens

    lane = tl.arange(0, SEGMENT_PAD)
    j = first - WINDOW + 1 + lane
    ok = (lane < SEGMENT) & (j >= start) & (j < end)
    leave = leave_window(j, start, WINDOW, STRIDE)
    evict = tl.load(EVICT + bh * tokens + j, mask=ok, other=0)
    entrant = ok & (evict > leave) & (leave < tl.minimum(first + SEGMENT, end))
    place = tl.cumsum(entrant.to(tl.int32), 0) - 1
    count = tl.sum(entrant.to(tl.int32), 0)
    tl.store(ENTRANT_COUNT + bh * segments + segment, count)
    stored = entrant & (count <= CAPACITY)
    tl.store(ENTRANTS + (bh * segments + segment) * CAPACITY + place, j, mask=stored)
    tl.store(KEY_ROW + bh * tokens + j, segment * ROWS + TOPK + place, mask=stored)

    entry = tl.arange(0, TOPK_PAD)
    position = first - start
    before = position - SEGMENT  # the previous segment's start
    listed = entry < tl.minimum(tl.maximum(position - WINDOW + 1, 0), TOPK)
    list_base = LISTS + (bh * list_tiles + list0 + position // LIST_TILE) * TOPK
    j = tl.load(list_base + entry, mask=listed, other=0)
    older = listed & (
        j - start <= before - WINDOW
    )  # was in the previous segment's list, not among its entrants
    u = tl.load(u_base + j)
    count = tl.minimum(tl.maximum(before - WINDOW + 1, 0), TOPK)
    rank = _rank_in_list(list_base - SEGMENT // LIST_TILE * TOPK, u_base, count, u, j, TOPK)
    link = tl.where(older, (segment - 1) * ROWS + rank, -1)
    tl.store(LINK + (bh * segments + segment) * TOPK + entry, link, mask=listed)


@triton.jit
def collect_partials_kernel(
    EVICT, LISTS, TILES, KEY_ROW, LINK, PART_K, PART_V, PART_GATE,
    tokens, list_tiles, segments,
    TOPK: tl.constexpr, WINDOW: tl.constexpr, LIST_TILE: tl.constexpr, SEGMENT: tl.constexpr, CAPACITY: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, ENTRIES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid (segments * ceil(TOPK / ENTRIES), b * hkv).

    PART_K, PART_V [b * hkv, segments * (TOPK + CAPACITY), D] fp32.
    """
    bh = tl.program_id(1).to(tl.int64)
    BLOCKS: tl.constexpr = (TOPK + ENTRIES - 1) // ENTRIES
    ROWS: tl.constexpr = TOPK + CAPACITY
    segment = tl.program_id(0) // BLOCKS
    entry = tl.program_id(0) % BLOCKS * ENTRIES + tl.arange(0, ENTRIES)
    first, start, end, _, list0, _ = sequence_tile(TILES, segment, tokens, SEGMENT, PACKED)
    position = first - start
    listed = entry < tl.minimum(tl.maximum(position - WINDOW + 1, 0), TOPK)
    list_base = LISTS + (bh * list_tiles + list0 + position // LIST_TILE) * TOPK
    j = tl.load(list_base + entry, mask=listed & (first < end), other=0)
    evict = tl.load(EVICT + bh * tokens + j)
    chain_end = listed & (first < end) & ((evict <= first + SEGMENT) | (first + SEGMENT >= end))
    if tl.sum(chain_end.to(tl.int32), 0) == 0:
        return

    dim = tl.arange(0, D_PAD)[None, :]
    base = bh * segments * ROWS
    own = segment * ROWS + entry
    sum_k = tl.zeros([ENTRIES, D_PAD], tl.float32)
    sum_v = tl.zeros([ENTRIES, D_PAD], tl.float32)
    sum_gate = tl.zeros([ENTRIES], tl.float32)
    row = tl.where(chain_end, own, -1)
    while tl.max(row, 0) >= 0:
        live = row >= 0
        live_2d = live[:, None] & (dim < D)
        sum_k += tl.load(PART_K + (base + row)[:, None] * D + dim, mask=live_2d, other=0.0)
        sum_v += tl.load(PART_V + (base + row)[:, None] * D + dim, mask=live_2d, other=0.0)
        sum_gate += tl.load(PART_GATE + base + row, mask=live, other=0.0)
        link = (bh * segments + row // ROWS) * TOPK + row % ROWS
        row = tl.load(LINK + link, mask=live, other=-1)
    row = tl.load(KEY_ROW + bh * tokens + j, mask=chain_end, other=-1)  # the key's row as an entrant
    live = row >= 0
    live_2d = live[:, None] & (dim < D)
    sum_k += tl.load(PART_K + (base + row)[:, None] * D + dim, mask=live_2d, other=0.0)
    sum_v += tl.load(PART_V + (base + row)[:, None] * D + dim, mask=live_2d, other=0.0)
    sum_gate += tl.load(PART_GATE + base + row, mask=live, other=0.0)

    tl.debug_barrier()  # several threads hold each entry: all must have read its rows before one overwrites them
    own_2d = chain_end[:, None] & (dim < D)
    tl.store(PART_K + (base + own)[:, None] * D + dim, sum_k, mask=own_2d)
    tl.store(PART_V + (base + own)[:, None] * D + dim, sum_v, mask=own_2d)
    tl.store(PART_GATE + base + own, sum_gate, mask=chain_end)
    tl.store(KEY_ROW + bh * tokens + j, own, mask=chain_end)
