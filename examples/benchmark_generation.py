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
from pathlib import Path

import torch
from generation_benchmark.flags import parse
from generation_benchmark.plot import plot
from generation_benchmark.sides import FIELDS, dense, new_cache, prefill, random_tokens, sparsek
from generation_benchmark.timing import copy_bandwidth, elapsed

from sparsek_megatron.errors import UserError, report_user_errors

PREFILL_REPEATS = 9


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


def main(argv: list[str]) -> None:
    args = parse(argv, __doc__)
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
