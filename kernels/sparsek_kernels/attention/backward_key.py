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
    """-> (d_key, d_value [b, s, hkv, d], key_sum [b, hkv, s] fp32)."""
    b, s, _, d = query.shape
    hkv, topk, capacity = plan.kv_heads, plan.topk, plan.capacity
    rows = b * hkv
    device = key.device
    allocate = torch.zeros if plan.packed else torch.empty  # rows past the last sequence are never written
    d_key = allocate(key.shape, dtype=key.dtype, device=device)
    d_value = allocate(key.shape, dtype=key.dtype, device=device)
    key_sum = allocate((b, hkv, s), dtype=torch.float32, device=device)

    segment_tiles, segments = plan.tiles(plan.segment)
    entrants = torch.empty((rows, segments, capacity), dtype=torch.int32, device=device)
    entrant_count = torch.empty((rows, segments), dtype=torch.int32, device=device)
    key_row = torch.full((rows, s), -1, dtype=torch.int32, device=device)
    link = torch.empty((rows, segments, topk), dtype=torch.int32, device=device)
    part_k = torch.empty((rows, segments * (topk + capacity), d), dtype=torch.float32, device=device)
    part_v = torch.empty_like(part_k)
    part_gate = torch.empty(part_k.shape[:2], dtype=torch.float32, device=device)

    slots, list_tiles = selection.threshold.shape[2], selection.lists.shape[2]
    sizes = {"SEGMENT": plan.segment, "CAPACITY": capacity}
    bookkeeping = {
        **sizes, "TOPK": topk, "WINDOW": plan.window, "LIST_TILE": plan.list_tile, "PACKED": plan.packed,
    }  # fmt: skip
    index_segments_kernel[(segments, rows)](
        scores, selection.evict, selection.lists, segment_tiles, entrants, entrant_count, key_row, link,
        s, list_tiles, segments,
        **bookkeeping, STRIDE=plan.stride,
        TOPK_PAD=triton.next_power_of_2(topk), SEGMENT_PAD=triton.next_power_of_2(plan.segment),
    )  # fmt: skip

    inputs = (query, key, value, scores, selection.threshold, selection.threshold_low, selection.evict)
    numbers = (
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *d_out.stride()[:3],
        s, slots, segments, hkv, plan.scale, plan.scale_log2, plan.floor,
    )  # fmt: skip
    tiling = plan.backward_survivors
    blocks = triton.cdiv(topk, tiling.keys) + triton.cdiv(capacity, tiling.keys)
    attention_backward_survivors_kernel[(segments * blocks, rows)](
        *inputs, segment_tiles, d_out, lse, delta, selection.lists, entrants, entrant_count,
        part_k, part_v, part_gate, *numbers, list_tiles,
        **plan.constants(tiling), **sizes, **tiling.launch,
    )  # fmt: skip
    collect_partials_kernel[(segments * triton.cdiv(topk, ENTRIES), rows)](
        selection.evict, selection.lists, segment_tiles, key_row, link, part_k, part_v, part_gate,
        s, list_tiles, segments,
        **bookkeeping, D=d, D_PAD=plan.dim_pad, ENTRIES=ENTRIES,
    )  # fmt: skip
    tiling = plan.backward_band
    tiles, grid = plan.tiles(tiling.keys)
    attention_backward_band_kernel[(grid, rows)](
        *inputs, tiles, d_out, lse, delta, entrant_count, key_row, part_k, part_v, part_gate,
        d_key, d_value, key_sum, *numbers,
        **plan.constants(tiling), **sizes, **tiling.launch,
    )  # fmt: skip
    return d_key, d_value, key_sum
