# SPDX-License-Identifier: Apache-2.0
"""Attention sharded over a context-parallel group against the same call on the whole sequence, and the bytes it takes.

float64, but for the scores, which travel as float32: values of both are exact in either.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from mcore_harness import device, parallel
from megatron.core import parallel_state
from sparsek_kernels import sparsek_attention
from sparsek_kernels.attention import reference
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worker import case

from sparsek_megatron.context_parallel import LAYOUTS, context_parallel_attention, exchange, shard_positions
from sparsek_megatron.context_parallel.traffic import CollectiveTraffic

HEADS, KV_HEADS, DIM = 4, 4, 8


def inputs(
    n: int, shape: str = "random", batch: int = 2, dtype: torch.dtype = torch.float64, dim: int = DIM
) -> list[torch.Tensor]:
    """query, key, value, scores of a whole sequence, and the gradient of the output."""
    g = torch.Generator().manual_seed(3)
    q, k, v, d_out = (
        torch.randn(batch, n, h, dim, generator=g, dtype=dtype) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS)
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


@case
def context_parallel_twice() -> dict[str, list[float]]:
    """1 for each of output and gradients that is not bitwise that of a first run. fp32, on GPUs where there are any."""
    n, dim, sizes = 128, DIM, {"topk": 6, "window": 8, "stride": 8, "pool": 24}
    if torch.cuda.is_available():  # what the compiled kernels need, over several of their tiles
        n, dim, sizes = 2048, 64, {"topk": 48, "window": 56, "stride": 64, "pool": 160}
    answer = {}
    with parallel(cp=2):
        group = parallel_state.get_context_parallel_group()
        *tensors, d_out = (x.to(device()) for x in inputs(n, dtype=torch.float32, dim=dim))
        options: dict[str, Any] = {**sizes, "gate": "key_value", "softmax_scale": dim**-0.5, "group": group}
        for layout in LAYOUTS:
            mine = shard_positions(n, 2, group.rank(), layout, d_out.device)
            runs = []
            for _ in range(2):
                shards = [x[:, mine].clone().requires_grad_() for x in tensors]
                out = context_parallel_attention(*shards, layout=layout, **options)
                runs.append([out, *torch.autograd.grad(out, shards, d_out[:, mine])])
            answer[layout] = [float(not torch.equal(a, b)) for a, b in zip(*runs, strict=True)]
    return answer


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


SELECTING = {
    "summaries": (exchange, "summarise"),
    "start states": (exchange, "start_states"),
    "sums over chunks": (exchange, "_sum_over_chunks"),
    "walk": (reference, "pool_indices"),
}


class Work(TorchDispatchMode):
    """Elements of all tensors that operators other than views are called with, by the function of SELECTING around."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.part = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            given = tree_leaves((args, kwargs))
            self.elements[self.part] += sum(x.numel() for x in given if isinstance(x, torch.Tensor))
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def told_apart(self) -> Iterator[None]:
        """Where the functions of SELECTING say that they run."""
        kept = {part: getattr(*place) for part, place in SELECTING.items()}

        def announced(part: str) -> Any:
            def function(*args: Any, **kwargs: Any) -> Any:
                self.part = part
                try:
                    return kept[part](*args, **kwargs)
                finally:
                    self.part = ""

            return function

        try:
            for part, place in SELECTING.items():
                setattr(*place, announced(part))
            yield
        finally:
            for part, place in SELECTING.items():
                setattr(*place, kept[part])


def work_of(n: int) -> dict[str, int]:
    """Elements that the parts of this rank's selection work on in one forward and backward."""
    group = parallel_state.get_context_parallel_group()
    *tensors, _ = inputs(n, dtype=torch.float32)
    mine = shard_positions(n, group.size(), group.rank())
    shards = [x[:, mine].clone().requires_grad_() for x in tensors]
    options: dict[str, Any] = {"topk": 6, "window": 8, "stride": 8, "pool": 16, "gate": "key_value"}
    work = Work()
    with work.told_apart(), work:
        context_parallel_attention(
            *shards, group=group, softmax_scale=1.0, backend="torch", **options
        ).sum().backward()
    return {part: work.elements[part] for part in SELECTING}


@case
def context_parallel_work() -> dict[str, dict[str, int]]:
    """Of a rank, by context-parallel size and length."""
    answer = {}
    for cp, lengths in {2: (128, 256), 4: (128, 256, 512)}.items():
        with parallel(cp=cp):
            answer |= {f"cp{cp}, {n}": work_of(n) for n in lengths}
    return answer
