# SPDX-License-Identifier: Apache-2.0
"""Time and memory of `select`, `score_gradient` and `sparsek` on one GPU.

    PYTHONPATH=kernels python kernels/benchmarks/selection.py --csv selection.csv

Each time is the median of CUDA graph replays of one call (so launch overhead of the host is left out; it is printed
separately). Memory is the peak of transient and kept tensors of one call, per token and KV head. The inputs of 8,192
tokens fit in the L2 cache, as they do in training, where the scorer has just written them.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Callable

import torch
from sparsek_kernels import select, sparsek
from sparsek_kernels.selection import score_gradient
from timing import captured, host_ms, median_ms, parse_with_cuda, peak_bytes

SHAPES = ("iid", "drifting", "rising", "falling", "equal", "adversarial")
HEADS = 8


def make_scores(shape: str, n: int, pool: int) -> torch.Tensor:
    """[1, n, HEADS] float32 scores on the GPU.

    "adversarial" rises slowly on a grid: every token enters the pool, all of the pool is fractional, most of it ties.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    noise = torch.randn(1, n, HEADS, device="cuda", generator=generator)
    ramp = torch.arange(n, device="cuda", dtype=torch.float32)[None, :, None].expand(1, n, HEADS)
    return {
        "iid": lambda: noise,
        "drifting": lambda: (
            noise + torch.randn(1, n, HEADS, device="cuda", generator=generator).cumsum(1) / n**0.5
        ),
        "rising": lambda: ramp * (100.0 / n),
        "falling": lambda: ramp * (-100.0 / n),
        "equal": lambda: torch.zeros_like(noise),
        "adversarial": lambda: (ramp * (10.0 / pool)).round() * 0.025 + (noise * 4).round() * 0.025,
    }[shape]().contiguous()


def graph_ms(call: Callable[[], object], replays: int) -> float:
    """Median milliseconds of replays of a captured call, its inputs where the call before left them."""
    return median_ms(captured(call), budget_ms=0, least=replays, flush=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", help="write every measurement to this file")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8_192, 32_768, 131_072, 1_048_576])
    parser.add_argument("--topk", type=int, nargs="+", default=[512, 2_048])
    parser.add_argument("--strides", type=int, nargs="+", default=[1, 16, 64, 128])
    parser.add_argument("--replays", type=int, default=7)
    arguments = parse_with_cuda(parser)

    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {HEADS} KV heads, window 512, pool 4 * topk\n"
        f"{'tokens':>9} {'topk':>5} {'stride':>6} "
        + " ".join(f"{shape:>11}" for shape in SHAPES)
        + "  bytes budget",
        flush=True,
    )
    rows = []
    for n, topk, stride in itertools.product(arguments.tokens, arguments.topk, arguments.strides):
        text, largest, budget = f"{n:9d} {topk:5d} {stride:6d}", 0.0, 64 + 4 * topk / 64
        for shape in SHAPES:
            scores = make_scores(shape, n, 4 * topk)

            def call(scores=scores, topk=topk, stride=stride):
                return select(scores, topk=topk, window=512, stride=stride)

            milliseconds = graph_ms(call, arguments.replays)
            per_token = peak_bytes(call) / (n * HEADS)
            text, largest = f"{text} {milliseconds:11.3f}", max(largest, per_token)
            rows.append({"tokens": n, "topk": topk, "stride": stride, "scores": shape, "ms": milliseconds})
            rows[-1].update(bytes_per_token_and_head=per_token, bytes_budget=budget)
        print(f"{text}  {largest:5.1f} {budget:6.1f}", flush=True)
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    for n, stride in ((8_192, 64), (131_072, 64), (131_072, 1)):
        scores = make_scores("iid", n, 2_048)
        selection = select(scores, topk=512, window=512, stride=stride)
        sums = torch.randn(2, 1, HEADS, n, device="cuda")
        backward = graph_ms(lambda selection=selection, sums=sums: score_gradient(selection, *sums), 20)
        host = host_ms(
            lambda scores=scores, stride=stride: select(scores, topk=512, window=512, stride=stride)
        )
        print(
            f"score backward, {n} tokens, stride {stride}: {backward:.3f} ms; host time of select {host:.3f} ms"
        )
    for count, n in ((1_024, 4_096), (132, 65_536)):
        z = torch.randn(count, n, device="cuda")
        print(f"sparsek, {count} rows of {n}, k = 512: {graph_ms(lambda z=z: sparsek(z, 512), 20):.3f} ms")


if __name__ == "__main__":
    main()
