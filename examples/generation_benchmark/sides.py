# SPDX-License-Identifier: Apache-2.0
"""Rows of results: one token of every sequence through all layers, from SparseK's caches or dense attention's."""

import argparse
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from generation_benchmark.timing import captured, elapsed
from sparsek_kernels import SparseKCache
from torch.nn.attention import SDPBackend, sdpa_kernel

FIELDS: tuple[str, ...] = (
    "side",
    "context",
    "batch",
    "layers_measured",
    "us_per_token",
    "bytes_per_sequence",
    "read_tb_per_s",
)
HOST_BOUND_TOKENS = (
    131_072  # below this, calls one by one would wait for the host: a graph is captured, as for SparseK
)
DENSE = {
    "cuDNN": (SDPBackend.CUDNN_ATTENTION, False),
    "cuDNN, packed group": (SDPBackend.CUDNN_ATTENTION, True),
    "FlashAttention": (SDPBackend.FLASH_ATTENTION, False),
    "FlashAttention, packed group": (SDPBackend.FLASH_ATTENTION, True),
}


def random_tokens(args: argparse.Namespace, batch: int, tokens: int) -> tuple[torch.Tensor, ...]:
    def new(heads: int) -> torch.Tensor:
        return torch.randn(batch, tokens, heads, args.head_dim, device="cuda", dtype=torch.bfloat16)

    scores = torch.randn(batch, tokens, args.kv_heads, device="cuda")
    return new(args.heads), new(args.kv_heads), new(args.kv_heads), scores


def new_cache(args: argparse.Namespace) -> SparseKCache:
    return SparseKCache(
        1, args.kv_heads, args.head_dim, topk=args.topk, window=args.window, stride=args.stride, device="cuda"
    )


def prefill(caches: list[SparseKCache], tokens: int, piece: tuple[torch.Tensor, ...]) -> None:
    """Feed `tokens` tokens to each layer's cache, a piece through all layers before the next, as a model does: the
    same rows again and again, with new scores."""
    query, key, value, scores = piece
    for start in range(0, tokens, query.shape[1]):
        count = min(query.shape[1], tokens - start)
        for cache in caches:
            cache.prefill(query[:, :count], key[:, :count], value[:, :count], scores[:, :count].normal_())


def sparsek(args: argparse.Namespace, context: int, batch: int) -> dict[str, object]:
    """One row of results."""
    cache = new_cache(args)
    prefill([cache], context, random_tokens(args, 1, min(context, args.prefill_piece)))
    caches = [cache.fork([0] * batch) for _ in range(args.layers)]
    token = random_tokens(args, batch, 1)

    def step() -> None:
        token[3].normal_()
        for cache in caches:
            cache.decode(*token)

    replay = captured(step)
    us = statistics.median(
        elapsed(lambda: [replay() for _ in range(args.stride)]) / args.stride for _ in range(7)
    )
    rows = args.topk + args.window + (args.stride - 1) / 2  # that a token attends to, on average
    read = min(rows, context) * 4 * args.head_dim * args.kv_heads * batch * args.layers
    size = sum(cache.nbytes for cache in caches) // batch
    return row("SparseK", context, batch, args.layers, us, size, read)


def row(
    side: str, context: int, batch: int, layers: int, us: float, size: int, read: float
) -> dict[str, object]:
    values = (side, context, batch, layers, f"{us:.1f}", size, f"{read / us * 1e-6:.2f}")
    return dict(zip(FIELDS, values, strict=True))


def dense(args: argparse.Namespace, context: int, batch: int) -> Iterator[dict[str, object]]:
    """Rows of results of the dense backends, those that run."""
    size = 4 * context * args.kv_heads * args.head_dim  # bytes of one sequence in one layer
    free = torch.cuda.mem_get_info()[0] - (4 << 30)
    layers = min(args.layers, int(free // (size * batch)))
    if layers == 0:
        print(f"dense, context {context}, batch {batch}: one layer's cache does not fit", flush=True)
        return
    shape = (batch, args.kv_heads, context, args.head_dim)
    keys, values = (
        [torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(layers)]
        for _ in range(2)
    )
    query = torch.randn(batch, args.heads, 1, args.head_dim, device="cuda", dtype=torch.bfloat16)
    for name, (backend, packed) in DENSE.items():
        q = query.view(batch, args.kv_heads, -1, args.head_dim) if packed else query

        def step(q: torch.Tensor = q, packed: bool = packed, backend: SDPBackend = backend) -> None:
            with sdpa_kernel(backend):
                for key, value in zip(keys, values, strict=True):
                    F.scaled_dot_product_attention(q, key, value, enable_gqa=not packed)

        try:
            step()
        except RuntimeError as err:
            print(f"{name}, context {context}, batch {batch}: {' '.join(str(err).split())[:90]}", flush=True)
            continue
        once: Callable[[], object] = step
        if context * batch < HOST_BOUND_TOKENS:
            try:
                once = captured(step)
            except RuntimeError:
                print(
                    f"{name}, context {context}, batch {batch}: not capturable, timed call by call",
                    flush=True,
                )
        repeat = max(1, round(30_000 / elapsed(once)))

        def run(once: Callable[[], object] = once, repeat: int = repeat) -> None:
            for _ in range(repeat):
                once()

        us = statistics.median(elapsed(run) / repeat for _ in range(3)) * args.layers / layers
        yield row(name, context, batch, layers, us, size * args.layers, size * args.layers * batch)
