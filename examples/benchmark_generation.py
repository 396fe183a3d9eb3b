#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Attention in generation: SparseK's cache against dense attention over a full key/value cache, on one GPU.

    python examples/benchmark_generation.py --output runs/generation            # .csv and .png
    python examples/benchmark_generation.py --short --output runs/generation    # about a minute
    python examples/benchmark_generation.py --from-csv runs/generation.csv --output runs/generation   # plot again

Times are those of all layers' attention for one token of every sequence, projections not included. SparseK runs as a
CUDA graph of one step of all layers, replayed over whole refresh periods; its caches come from a real prefill of that
many tokens. Dense attention is torch's cuDNN and FlashAttention backends, with the query heads of a group packed into
the query length or not; each layer has its own cache as far as memory goes, and the time of fewer layers is scaled up
(the column `layers_measured` says so). Inputs are random bfloat16.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from sparsek_kernels import SparseKCache
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsek_megatron.errors import UserError, report_user_errors

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
PREFILL_REPEATS = 9
DENSE = {
    "cuDNN": (SDPBackend.CUDNN_ATTENTION, False),
    "cuDNN, packed group": (SDPBackend.CUDNN_ATTENTION, True),
    "FlashAttention": (SDPBackend.FLASH_ATTENTION, False),
    "FlashAttention, packed group": (SDPBackend.FLASH_ATTENTION, True),
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {"type": int, "nargs": "+"}
    parser.add_argument("--contexts", default=[2**i for i in range(12, 21)], **numbers)
    parser.add_argument("--batch-sizes", default=[1, 32], **numbers)
    parser.add_argument("--prefill-lengths", default=[2**i for i in range(15, 21)], **numbers)
    parser.add_argument("--prefill-piece", type=int, default=32_768, help="tokens of one prefill call")
    parser.add_argument(
        "--prefill-layers", type=int, default=8, help="layers that each piece goes through; times are those of one"
    )
    for name, value in (("layers", 32), ("heads", 32), ("kv-heads", 8), ("head-dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("topk", 512), ("window", 512), ("stride", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--short", action="store_true", help="contexts 4k, 128k and 1M; prefill 32k, 256k and 1M"
    )
    parser.add_argument("--no-dense", action="store_true", help="leave the dense side out")
    parser.add_argument("--from-csv", help="measure nothing: plot this file")
    parser.add_argument("--no-plot", action="store_true", help="write the CSV file only")
    parser.add_argument("--output", required=True, help="path of the results without .csv and .png")
    args = parser.parse_args(argv)
    if args.short:
        args.contexts, args.prefill_lengths = [4096, 131_072, 1_048_576], [32_768, 262_144, 1_048_576]
    if args.from_csv is None and not torch.cuda.is_available():
        raise UserError(
            "no CUDA device: this benchmark times GPU kernels; --from-csv FILE plots a file of results"
        )
    return args


def elapsed(run: Callable[[], object]) -> float:
    """Microseconds of device time between the start and the end of what `run` queues."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """`step` as a CUDA graph, after two calls that compile what it needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


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


def measure(args: argparse.Namespace, path: Path) -> None:
    """Write one row of results after the other: SparseK's, then dense attention's, with prefill in between."""
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {copy_bandwidth():.2f} TB/s read + write",
        flush=True,
    )
    cells = [(batch, context) for batch in args.batch_sizes for context in args.contexts]
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, FIELDS)
        writer.writeheader()

        def add(result: dict[str, object]) -> None:
            print(*result.values(), flush=True)
            writer.writerow(result)
            stream.flush()

        print(" ".join(FIELDS), flush=True)
        for batch, context in cells:
            add(sparsek(args, context, batch))
        if args.prefill_lengths:
            measure_prefill(args)
        for batch, context in cells if not args.no_dense else ():
            for result in dense(args, context, batch):
                add(result)
            torch.cuda.empty_cache()


def copy_bandwidth() -> float:
    source = torch.zeros(1 << 28, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    us = statistics.median(elapsed(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.nbytes / us * 1e-6


def measure_prefill(args: argparse.Namespace) -> None:
    """Print the time of a layer's attention over prompts of growing length, one sequence."""
    piece, layers = random_tokens(args, 1, args.prefill_piece), range(args.prefill_layers)
    for _ in range(2):
        prefill([new_cache(args)], 3 * args.prefill_piece, piece)
    print(
        f"prefill of {len(layers)} layers in pieces of {args.prefill_piece}: tokens, ms a layer (median, least ... "
        f"most of {PREFILL_REPEATS}), us per 1,000 tokens, peak GiB",
        flush=True,
    )
    for tokens in args.prefill_lengths:
        torch.cuda.reset_peak_memory_stats()
        ms = []
        for _ in range(PREFILL_REPEATS):
            caches = [new_cache(args) for _ in layers]
            ms.append(elapsed(lambda: prefill(caches, tokens, piece)) * 1e-3 / len(layers))  # noqa: B023
        median, peak = statistics.median(ms), torch.cuda.max_memory_allocated() / 2**30
        print(
            f"{tokens} {median:.2f} ({min(ms):.2f} ... {max(ms):.2f}) {median / tokens * 1e6:.1f} {peak:.2f}",
            flush=True,
        )


def plot(results: list[dict[str, str]], path: Path) -> None:
    """Time per token and cache bytes against the context, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    batches = sorted({int(r["batch"]) for r in results})
    for batch in batches:
        here = [r for r in results if int(r["batch"]) == batch]
        contexts = sorted({int(r["context"]) for r in here})
        for side, style in (("SparseK", "o-"), ("dense", "s--")):
            points = []
            for context in contexts:
                times = [
                    float(r["us_per_token"])
                    for r in here
                    if int(r["context"]) == context and (r["side"] == "SparseK") == (side == "SparseK")
                ]
                points += [(context, min(times))] if times else []
            if points:
                left.plot(*zip(*points, strict=True), style, label=f"{side}, batch {batch}")
    for side, style in (("SparseK", "o-"), ("dense", "s--")):
        points = sorted(
            {
                (int(r["context"]), int(r["bytes_per_sequence"]))
                for r in results
                if (r["side"] == "SparseK") == (side == "SparseK")
            }
        )
        if points:
            right.plot(*zip(*points, strict=True), style, label=side)
    left.set_ylabel("attention of one token, all layers (us)")
    right.set_ylabel("cache of one sequence (bytes)")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("context (tokens)")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(argv: list[str]) -> None:
    args = parse(argv)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    source = Path(args.from_csv) if args.from_csv else output.with_suffix(".csv")
    if args.from_csv is None:
        torch.manual_seed(0)
        measure(args, source)
    if not args.no_plot:
        if not source.is_file():
            raise UserError(f"--from-csv {source}: no such file")
        with open(source, newline="", encoding="utf-8") as stream:
            plot(list(csv.DictReader(stream)), output.with_suffix(".png"))


if __name__ == "__main__":
    with report_user_errors():
        main(sys.argv[1:])
