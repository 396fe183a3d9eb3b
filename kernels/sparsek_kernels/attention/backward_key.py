# SPDX-License-Identifier: Apache-2.0
# Triton's language is not typed Python:
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
"""Launch of the key-major backward: dK, dV, and per key the gate gradients of the queries for which it is in F.

Every (query, key) pair belongs to exactly one of two passes, the survivors pass (older keys, by segments of
queries) and the band pass (local keys, by blocks of keys); `segments.py` says which and where the partial sums
meet.
"""

import torch

from sparsek_kernels.attention.backward_band import attention_backward_band_kernel
from sparsek_kernels.attention.backward_survivors import attention_backward_survivors_kernel
from sparsek_kernels.attention.plan import AttentionPlan
from sparsek_kernels.attention.segments import collect_partials_kernel, index_segments_kernel
from sparsek_kernels.launch import Launch, Named
from sparsek_kernels.selection.plan import power_of_2

ENTRIES = (
    16  # list entries per program of the collecting kernel: few enough that one long chain delays few others
)


def attention_backward_key(plan: AttentionPlan, query, key, value, scores, selection, d_out, lse, delta):
    """-> (d_key, d_value [b, E, hkv, d], key_sum [b, hkv, E] fp32), carried keys included."""
    query, d_out = _with_near_heads(plan, query), _with_near_heads(plan, d_out)
    rows, topk, capacity, device = plan.batch * plan.kv_heads, plan.topk, plan.capacity, key.device
    allocate = torch.zeros if plan.packed else torch.empty  # rows past the last sequence are never written
    d_key = allocate(key.shape, dtype=key.dtype, device=device)
    d_value = allocate(key.shape, dtype=key.dtype, device=device)
    key_sum = allocate((plan.batch, plan.kv_heads, plan.keys), dtype=torch.float32, device=device)

    segments = plan.num_tiles(plan.segment)
    part_k = torch.empty((rows, segments * (topk + capacity), plan.dim), dtype=torch.float32, device=device)
    buffers = {
        "query": query, "key": key, "value": value, "scores": scores, "tau": selection.threshold,
        "tau_low": selection.threshold_low, "evict": selection.evict, "lists": selection.lists,
        "segment_tiles": plan.tiles(plan.segment, selection.cu_seqlens),
        "band_tiles": plan.tiles(plan.backward_band.keys, selection.cu_seqlens),
        "d_out": d_out, "lse": lse, "delta": delta,
        "entrants": torch.empty((rows, segments, capacity), dtype=torch.int32, device=device),
        "entrant_count": torch.empty((rows, segments), dtype=torch.int32, device=device),
        "key_row": torch.full((rows, plan.keys), -1, dtype=torch.int32, device=device),
        "link": torch.empty((rows, segments, topk), dtype=torch.int32, device=device),
        "part_k": part_k, "part_v": torch.empty_like(part_k),
        "part_gate": torch.empty(part_k.shape[:2], dtype=torch.float32, device=device),
        "d_key": d_key, "d_value": d_value, "key_sum": key_sum,
    }  # fmt: skip
    plan.run(_launches, buffers)
    return d_key, d_value, key_sum


def _with_near_heads(plan: AttentionPlan, x: torch.Tensor) -> torch.Tensor:
    """`x` [b, s, hq, d], copied where heads of one group lie 2^31 elements apart, as views of [b, h, s, d] may.

    The kernels multiply a head's place in its group and the stride of heads in int32. In int64 forward and backward
    together took 3.6 % longer, for a layout that hardly anyone has.
    """
    return x if (plan.group - 1) * x.stride(2) < 2**31 else x.contiguous()


def _launches(plan: AttentionPlan, x: Named) -> list[Launch]:
    rows, topk, capacity, segments = plan.batch * plan.kv_heads, plan.topk, plan.capacity, x["link"].shape[1]
    recent = plan.window + plan.stride - 1
    pool = plan.carried - recent if plan.carried else 0  # carried keys that left the window before
    slots, list_tiles = x["tau"].shape[2], x["lists"].shape[2]
    sizes = {"SEGMENT": plan.segment, "CAPACITY": capacity}
    carried = {"CARRIED": plan.carried, "POOL": pool}
    bookkeeping = {
        **sizes, "TOPK": topk, "WINDOW": plan.window, "STRIDE": plan.stride, "LIST_TILE": plan.list_tile,
        "PACKED": plan.packed, "CARRIED": plan.carried,
    }  # fmt: skip
    lengths = (plan.tokens, plan.past, list_tiles, segments)
    index = Launch(
        index_segments_kernel,
        (segments, rows),
        ("scores", "evict", "lists", "segment_tiles", "entrants", "entrant_count", "key_row", "link", *lengths),
        {
            **bookkeeping, "POOL": pool, "TOPK_PAD": power_of_2(topk),
            "SEGMENT_PAD": power_of_2(plan.segment),
        },
    )  # fmt: skip

    inputs = ("query", "key", "value", "scores", "tau", "tau_low", "evict")
    numbers = (
        *(stride for name in ("query", "key", "value", "d_out") for stride in x[name].stride()[:3]),
        plan.tokens, plan.past, slots, segments, plan.kv_heads, plan.scale, plan.scale_log2, plan.floor,
    )  # fmt: skip
    tiling = plan.backward_survivors
    blocks = -(-topk // tiling.keys) + -(-capacity // tiling.keys)
    survivors = Launch(
        attention_backward_survivors_kernel,
        (segments * blocks, rows),
        (
            *inputs, "segment_tiles", "d_out", "lse", "delta", "lists", "entrants", "entrant_count",
            "part_k", "part_v", "part_gate", *numbers, list_tiles,
        ),
        {**plan.constants(tiling), **sizes, **carried, **tiling.launch},
    )  # fmt: skip
    collect = Launch(
        collect_partials_kernel,
        (segments * -(-topk // ENTRIES), rows),
        ("evict", "lists", "segment_tiles", "key_row", "link", "part_k", "part_v", "part_gate", *lengths),
        {**bookkeeping, "D": plan.dim, "D_PAD": plan.dim_pad, "ENTRIES": ENTRIES},
    )  # fmt: skip

    tiling = plan.backward_band
    blocks = plan.num_tiles(tiling.keys)
    first = 0  # of the band's keys, as a token
    if plan.carried:
        oldest = (plan.past - recent) // tiling.keys
        blocks += plan.past // tiling.keys - oldest
        first = oldest * tiling.keys - plan.past
    band = Launch(
        attention_backward_band_kernel,
        (blocks - (-pool // tiling.keys), rows),
        (
            *inputs, "band_tiles", "d_out", "lse", "delta", "entrant_count", "key_row", "part_k", "part_v", "part_gate",
            "d_key", "d_value", "key_sum", *numbers, blocks, first,
        ),
        {**plan.constants(tiling), **sizes, **carried, **tiling.launch},
    )  # fmt: skip
    return [index, survivors, collect, band]
