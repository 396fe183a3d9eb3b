# SPDX-License-Identifier: Apache-2.0
# Triton's language is not typed Python:
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
"""Launch of the key-major backward: dK, dV, and per key the gate gradients of the queries for which it is in F.

Every (query, key) pair belongs to exactly one of two passes, the survivors pass (older keys, by segments of
queries) and the band pass (local keys, by blocks of keys); `segments.py` says which and where the partial sums
meet.
"""

import torch
import triton

from sparsek_kernels.attention.backward_band import attention_backward_band_kernel
from sparsek_kernels.attention.backward_survivors import attention_backward_survivors_kernel
from sparsek_kernels.attention.segments import collect_partials_kernel, index_segments_kernel

ENTRIES = (
    16  # list entries per program of the collecting kernel: few enough that one long chain delays few others
)


def attention_backward_key(plan, query, key, value, scores, selection, d_out, lse, delta):
    """-> (d_key, d_value [b, E, hkv, d], key_sum [b, hkv, E] fp32), carried keys included."""
    b, s, _, d = query.shape
    hkv, topk, capacity = plan.kv_heads, plan.topk, plan.capacity
    rows = b * hkv
    recent = plan.window + plan.stride - 1
    pool = plan.carried - recent if plan.carried else 0  # carried keys that left the window before
    device = key.device
    allocate = torch.zeros if plan.packed else torch.empty  # rows past the last sequence are never written
    d_key = allocate(key.shape, dtype=key.dtype, device=device)
    d_value = allocate(key.shape, dtype=key.dtype, device=device)
    key_sum = allocate((b, hkv, key.shape[1]), dtype=torch.float32, device=device)

    segment_tiles, segments = plan.tiles(plan.segment)
    entrants = torch.empty((rows, segments, capacity), dtype=torch.int32, device=device)
    entrant_count = torch.empty((rows, segments), dtype=torch.int32, device=device)
    key_row = torch.full((rows, key.shape[1]), -1, dtype=torch.int32, device=device)
    link = torch.empty((rows, segments, topk), dtype=torch.int32, device=device)
    part_k = torch.empty((rows, segments * (topk + capacity), d), dtype=torch.float32, device=device)
    part_v = torch.empty_like(part_k)
    part_gate = torch.empty(part_k.shape[:2], dtype=torch.float32, device=device)

    slots, list_tiles = selection.threshold.shape[2], selection.lists.shape[2]
    sizes = {"SEGMENT": plan.segment, "CAPACITY": capacity}
    carried = {"CARRIED": plan.carried, "POOL": pool}
    bookkeeping = {
        **sizes, "TOPK": topk, "WINDOW": plan.window, "STRIDE": plan.stride, "LIST_TILE": plan.list_tile,
        "PACKED": plan.packed, "CARRIED": plan.carried,
    }  # fmt: skip
    index_segments_kernel[(segments, rows)](
        scores, selection.evict, selection.lists, segment_tiles, entrants, entrant_count, key_row, link,
        s, plan.past, list_tiles, segments,
        **bookkeeping, POOL=pool,
        TOPK_PAD=triton.next_power_of_2(topk), SEGMENT_PAD=triton.next_power_of_2(plan.segment),
    )  # fmt: skip

    inputs = (query, key, value, scores, selection.threshold, selection.threshold_low, selection.evict)
    numbers = (
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *d_out.stride()[:3],
        s, plan.past, slots, segments, hkv, plan.scale, plan.scale_log2, plan.floor,
    )  # fmt: skip
    tiling = plan.backward_survivors
    blocks = triton.cdiv(topk, tiling.keys) + triton.cdiv(capacity, tiling.keys)
    attention_backward_survivors_kernel[(segments * blocks, rows)](
        *inputs, segment_tiles, d_out, lse, delta, selection.lists, entrants, entrant_count,
        part_k, part_v, part_gate, *numbers, list_tiles,
        **plan.constants(tiling), **sizes, **carried, **tiling.launch,
    )  # fmt: skip
    collect_partials_kernel[(segments * triton.cdiv(topk, ENTRIES), rows)](
        selection.evict, selection.lists, segment_tiles, key_row, link, part_k, part_v, part_gate,
        s, plan.past, list_tiles, segments,
        **bookkeeping, D=d, D_PAD=plan.dim_pad, ENTRIES=ENTRIES,
    )  # fmt: skip
    tiling = plan.backward_band
    tiles, blocks = plan.tiles(tiling.keys)
    first = 0  # of the band's keys, as a token
    if plan.carried:
        oldest = (plan.past - recent) // tiling.keys
        blocks += plan.past // tiling.keys - oldest
        first = oldest * tiling.keys - plan.past
    attention_backward_band_kernel[(blocks + triton.cdiv(pool, tiling.keys), rows)](
        *inputs, tiles, d_out, lse, delta, entrant_count, key_row, part_k, part_v, part_gate,
        d_key, d_value, key_sum, *numbers, blocks, first,
        **plan.constants(tiling), **sizes, **carried, **tiling.launch,
    )  # fmt: skip
    return d_key, d_value, key_sum
