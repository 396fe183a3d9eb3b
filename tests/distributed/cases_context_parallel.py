# SPDX-License-Identifier: Apache-2.0
"""Attention sharded over a context-parallel group against the same call on the whole sequence, and the bytes it takes.

float64, but for the scores, which travel as float32: values of both are exact in either.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from mcore_harness import parallel
from megatron.core import parallel_state
from sparsek_kernels import sparsek_attention
from worker import case

from sparsek_megatron.context_parallel import context_parallel_attention, shard_positions
from sparsek_megatron.context_parallel.traffic import CollectiveTraffic

HEADS, KV_HEADS, DIM = 4, 4, 8


def inputs(
    n: int, shape: str = "random", batch: int = 2, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    """query, key, value, scores of a whole sequence, and the gradient of the output."""
    g = torch.Generator().manual_seed(3)
    q, k, v, d_out = (
        torch.randn(batch, n, h, DIM, generator=g, dtype=dtype) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    u = torch.randn(batch, n, KV_HEADS, generator=g)
    ramp = torch.arange(n)[None, :, None].expand_as(u) / 16
    u = {"random": u, "equal": u * 0, "rising": u / 8 + ramp, "falling": u / 8 - ramp}[shape]
    return [q, k, v, u.to(dtype), d_out]


def compare(
    n: int, topk: int, window: int, stride: int, pool: int, *, layout: str = "zigzag", method: str = "p2p",
    gate: str = "key_value", shape: str = "random", bounds: list[int] | None = None,
) -> list[float]:  # fmt: skip
    """max |sharded - whole| / max |whole| of the output and of each gradient, this rank's tokens."""
    group = parallel_state.get_context_parallel_group()
    *tensors, d_out = inputs(n, shape, batch=1 if bounds else 2)
    options: dict[str, Any] = {"topk": topk, "window": window, "stride": stride, "pool": pool, "gate": gate}
    options |= {"softmax_scale": DIM**-0.5, "backend": "torch"}
    options["cu_seqlens"] = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    whole = [x.clone().requires_grad_() for x in tensors]
    out = sparsek_attention(*whole, **options)
    want = [out, *torch.autograd.grad(out, whole, d_out)]
    parts = [
        a + shard_positions(b - a, group.size(), group.rank(), layout) for a, b in pairwise(bounds or [0, n])
    ]
    mine = torch.cat(parts)
    shards = [x[:, mine].clone().requires_grad_() for x in tensors]
    got = context_parallel_attention(*shards, group=group, layout=layout, cp_comm_type=method, **options)
    found = [got, *torch.autograd.grad(got, shards, d_out[:, mine])]
    return [
        float((a - b[:, mine]).detach().abs().max() / b.detach().abs().max().clamp(min=1e-30))
        for a, b in zip(found, want, strict=True)
    ]


def every_layout(cp: int) -> dict[str, list[float]]:
    answer = {}
    with parallel(cp=cp):
        for layout in ("zigzag", "contiguous"):
            for name, settings in {
                "one token a refresh": {"n": 64, "topk": 4, "window": 5, "stride": 1, "pool": 9},
                "chunks at refresh points": {"n": 128, "topk": 6, "window": 8, "stride": 8, "pool": 24},
                "chunks off refresh points": {"n": 88, "topk": 6, "window": 9, "stride": 5, "pool": 12},
                "chunks shorter than the window": {"n": 48, "topk": 5, "window": 30, "stride": 7, "pool": 12},
                "chunks of two tokens": {
                    "n": 16,
                    "topk": 3,
                    "window": 9,
                    "stride": 4,
                    "pool": 8,
                    "gate": "logit",
                },
                "hard": {"n": 64, "topk": 6, "window": 4, "stride": 4, "pool": 6},
                "equal": {"n": 64, "topk": 5, "window": 4, "stride": 4, "pool": 9, "shape": "equal"},
                "rising": {"n": 96, "topk": 5, "window": 6, "stride": 4, "pool": 9, "shape": "rising"},
                "falling": {"n": 96, "topk": 5, "window": 6, "stride": 4, "pool": 9, "shape": "falling"},
                "packed": {
                    "n": 104,
                    "topk": 4,
                    "window": 5,
                    "stride": 4,
                    "pool": 9,
                    "bounds": [0, 32, 32, 88, 104],
                },
            }.items():
                answer[f"{layout}, {name}"] = compare(**settings, layout=layout)
            packed = {
                "n": 104,
                "topk": 4,
                "window": 5,
                "stride": 4,
                "pool": 9,
                "bounds": [0, 32, 32, 88, 104],
            }
            answer[f"{layout}, a2a packed"] = compare(**packed, layout=layout, method="a2a")
            answer[f"{layout}, a2a"] = compare(96, 6, 8, 8, 24, layout=layout, method="a2a", gate="value")
    return answer


@case
def context_parallel_cp2() -> dict[str, list[float]]:
    return every_layout(2)


@case
def context_parallel_cp4() -> dict[str, list[float]]:
    return every_layout(4)


def traffic_of(n: int, **sizes: int) -> int:
    """Bytes that this rank receives in one forward and backward."""
    group = parallel_state.get_context_parallel_group()
    *tensors, _ = inputs(n, dtype=torch.float32)
    mine = shard_positions(n, group.size(), group.rank())
    shards = [x[:, mine].clone().requires_grad_() for x in tensors]
    with CollectiveTraffic() as traffic:
        options: dict[str, Any] = {**sizes, "gate": "key_value", "softmax_scale": 1.0, "backend": "torch"}
        context_parallel_attention(*shards, group=group, **options).sum().backward()
    return traffic.total


@case
def context_parallel_traffic() -> dict[str, Any]:
    """Bytes per rank at several lengths, and at several sizes of what a chunk needs."""
    sizes = {"topk": 6, "window": 8, "stride": 4, "pool": 24}
    with parallel(cp=4):
        answer: dict[str, Any] = {str(n): traffic_of(n, **sizes) for n in (128, 256, 512)}
        grown = {"topk": 12, "pool": 48, "window": 16, "stride": 8}
        answer |= {name: traffic_of(256, **{**sizes, name: value}) for name, value in grown.items()}
    return answer
