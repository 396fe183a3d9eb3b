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

With a state, segments keep to positions, so the first one may be a rest; its list was taken when the call began. Keys
count from the first carried one (`selection.types`, E), queries from the call's first token, so key e is token
e - CARRIED: negative for recent tokens, and without meaning for the carried pool (e < POOL), which left the
window before the call.
"""

import triton
import triton.language as tl

from sparsek_kernels.attention.tile import sequence_tile


@triton.jit
def segment_tile(
    TILES, segment, tokens, past, SEGMENT: tl.constexpr, STRIDE: tl.constexpr, LIST_TILE: tl.constexpr,
    PACKED: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    """(first, start, end, slot0, list, base) of a segment.

    first, start, end: tokens, as in `sequence_tile`; list: list tile of the segment's list; base: the refresh point
    at which that list was taken, as a token.
    """
    first, start, end, slot0, list0, _ = sequence_tile(TILES, segment, tokens, SEGMENT, PACKED)
    base = first
    if CARRIED > 0:
        first -= past % SEGMENT
        start, slot0, list0 = -past, -(past // STRIDE), -(past // LIST_TILE)
        base = tl.maximum(first, past // STRIDE * STRIDE - past)
    listed_at = tl.maximum(first - start, past) if CARRIED > 0 else first - start
    return first, start, end, slot0, list0 + listed_at // LIST_TILE, base


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
    tokens, past, list_tiles, segments,
    TOPK: tl.constexpr, TOPK_PAD: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, LIST_TILE: tl.constexpr,
    SEGMENT: tl.constexpr, SEGMENT_PAD: tl.constexpr, CAPACITY: tl.constexpr, PACKED: tl.constexpr,
    CARRIED: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """Grid (segments, b * hkv). ENTRANTS [b * hkv, segments, CAPACITY], LINK [b * hkv, segments, TOPK] int32."""
    bh = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(0)
    first, start, end, _, own_list, base = segment_tile(
        TILES, segment, tokens, past, SEGMENT, STRIDE, LIST_TILE, PACKED, CARRIED
    )
    if first >= end:
        return
    ROWS: tl.constexpr = TOPK + CAPACITY
    keys = CARRIED + tokens
    u_base = U + bh * keys

    lane = tl.arange(0, SEGMENT_PAD)
    j = first - WINDOW + 1 + lane
    ok = (lane < SEGMENT) & (j >= start) & (j < end)
    if CARRIED > 0:
        ok &= j > base - WINDOW  # older ones are in the segment's list, or dead
    leave = leave_window(j, start, WINDOW, STRIDE)
    evict = tl.load(EVICT + bh * keys + CARRIED + j, mask=ok, other=0)
    entrant = ok & (evict > leave) & (leave < tl.minimum(first + SEGMENT, end))
    place = tl.cumsum(entrant.to(tl.int32), 0) - 1
    count = tl.sum(entrant.to(tl.int32), 0)
    tl.store(ENTRANT_COUNT + bh * segments + segment, count)
    stored = entrant & (count <= CAPACITY)
    tl.store(ENTRANTS + (bh * segments + segment) * CAPACITY + place, CARRIED + j, mask=stored)
    tl.store(KEY_ROW + bh * keys + CARRIED + j, segment * ROWS + TOPK + place, mask=stored)

    entry = tl.arange(0, TOPK_PAD)
    before = first - SEGMENT - start  # position at which the previous segment's list was taken
    earlier_list = own_list - SEGMENT // LIST_TILE
    if CARRIED > 0:
        before = tl.maximum(before, past // STRIDE * STRIDE)
        earlier_list = tl.maximum(earlier_list, 0)
    listed = entry < tl.minimum(tl.maximum(base - start - WINDOW + 1, 0), TOPK)
    list_base = LISTS + bh * list_tiles * TOPK
    j = tl.load(list_base + own_list * TOPK + entry, mask=listed, other=0)
    # Whether it was in the previous segment's list, not among its entrants.
    older = listed & (j - CARRIED - start <= before - WINDOW)
    if CARRIED > 0:
        older = (segment > 0) & (older | (listed & (j < POOL)))
    u = tl.load(u_base + j)
    count = tl.minimum(tl.maximum(before - WINDOW + 1, 0), TOPK)
    rank = _rank_in_list(list_base + earlier_list * TOPK, u_base, count, u, j, TOPK)
    link = tl.where(older, (segment - 1) * ROWS + rank, -1)
    tl.store(LINK + (bh * segments + segment) * TOPK + entry, link, mask=listed)


@triton.jit
def collect_partials_kernel(
    EVICT, LISTS, TILES, KEY_ROW, LINK, PART_K, PART_V, PART_GATE,
    tokens, past, list_tiles, segments,
    TOPK: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, LIST_TILE: tl.constexpr, SEGMENT: tl.constexpr,
    CAPACITY: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ENTRIES: tl.constexpr, PACKED: tl.constexpr,
    CARRIED: tl.constexpr,
):  # fmt: skip
    """Grid (segments * ceil(TOPK / ENTRIES), b * hkv).

    PART_K, PART_V [b * hkv, segments * (TOPK + CAPACITY), D] fp32.
    """
    bh = tl.program_id(1).to(tl.int64)
    BLOCKS: tl.constexpr = (TOPK + ENTRIES - 1) // ENTRIES
    ROWS: tl.constexpr = TOPK + CAPACITY
    segment = tl.program_id(0) // BLOCKS
    entry = tl.program_id(0) % BLOCKS * ENTRIES + tl.arange(0, ENTRIES)
    first, start, end, _, own_list, taken = segment_tile(
        TILES, segment, tokens, past, SEGMENT, STRIDE, LIST_TILE, PACKED, CARRIED
    )
    keys = CARRIED + tokens
    listed = entry < tl.minimum(tl.maximum(taken - start - WINDOW + 1, 0), TOPK)
    list_base = LISTS + (bh * list_tiles + own_list) * TOPK
    j = tl.load(list_base + entry, mask=listed & (first < end), other=0)
    evict = tl.load(EVICT + bh * keys + j)
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
    row = tl.load(KEY_ROW + bh * keys + j, mask=chain_end, other=-1)  # the key's row as an entrant
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
    tl.store(KEY_ROW + bh * keys + j, own, mask=chain_end)
