# SPDX-License-Identifier: Apache-2.0
"""SparseK attention beside its alternatives: same shapes, same machine, one run.

    python kernels/benchmarks/attention.py --out results      # needs CUDA; --lengths, --heads, ... change the case

Sides are in `peers.py`. Times are medians in milliseconds with a cold L2 cache. `sparsek` includes selection and the
score gradient; "select" is selection alone. Useful TFLOP/s counts 4 d FLOPs per attended (query, key) pair and head in
the forward pass and 2.5 times that in the backward pass, whatever a kernel recomputes or masks. Peak memory is that of
one forward and backward, inputs aside.

A side that cannot run a case is listed with its reason. A side other than ours is skipped at a length if its time at
the longest measured one, scaled by the square of the lengths' ratio, exceeds --limit-s. No result is extrapolated.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import gc
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import triton
from peers import SIDES, Case, Side, restrict_nsa_tuning
from sparsek_kernels import select
from timing import captured, median_ms, parse_with_cuda, peak_bytes

Row = dict[str, object]
FAILURES = (RuntimeError, ImportError, ValueError, NotImplementedError, AssertionError)


def measure(name: str, make: Callable[[Case], Side], case: Case, budget_ms: float, graph: bool) -> Row:
    side = make(case)
    d_out = torch.randn_like(side.forward())

    def both() -> object:
        return torch.autograd.grad(side.forward(), side.leaves, d_out, allow_unused=True)

    def time(call: Callable[[], object]) -> float:
        return median_ms(captured(call) if graph else call, budget_ms=budget_ms)

    both()
    peak = peak_bytes(both)
    forward_ms, both_ms = time(side.forward), time(both)
    flops = case.forward_flops(side.pairs)
    row: Row = {
        "tokens": case.tokens,
        "side": name,
        "graph": graph,
        "forward_ms": round(forward_ms, 4),
        "forward_backward_ms": round(both_ms, 4),
        "forward_tflops": round(flops / forward_ms / 1e9, 1),
        "backward_tflops": round(2.5 * flops / (both_ms - forward_ms) / 1e9, 1),
        "peak_gib": round(peak / 2**30, 3),
    }
    if name == "sparsek":
        scores = case.scores().detach()
        options = {"topk": case.topk, "window": case.window, "stride": case.stride}
        row["select_ms"] = round(time(lambda: select(scores, **options)), 4)
    return row


def too_long(name: str, tokens: int, rows: list[Row], limit_s: float) -> str | None:
    """Why a side is not run at a length, from the longest one it has been measured at; None to run it."""
    before = [row for row in rows if row["side"] == name and "error" not in row]
    if not before:
        return None
    last = before[-1]
    seconds = float(str(last["forward_backward_ms"])) / 1e3 * (tokens / int(str(last["tokens"]))) ** 2
    if name != "sparsek" and seconds > limit_s:
        return f"skipped: a call could take {seconds:.1f} s (limit {limit_s} s)"
    return None


HEADER = "  tokens side             fwd ms   f+b ms  TF/s f  TF/s b     GiB   (x: cudnn time / this time, fwd and f+b)"
COLUMNS = {
    "forward_ms": 9,
    "forward_backward_ms": 9,
    "forward_tflops": 8,
    "backward_tflops": 8,
    "peak_gib": 8,
}


def gains(row: Row, rows: list[Row]) -> list[float]:
    """cuDNN's time over this one's, forward and forward + backward; empty where cuDNN was not measured."""
    for other in rows:
        if other["side"] == "cudnn" and other["tokens"] == row["tokens"] and "error" not in other:
            return [float(str(other[k])) / float(str(row[k])) for k in ("forward_ms", "forward_backward_ms")]
    return []


def line(row: Row, rows: list[Row]) -> str:
    """One row of the table."""
    text = f"{row['tokens']:>8} {row['side']:<14}"
    if "error" in row:
        return f"{text} {row['error']}"
    text += "".join(f"{row[key]:>{width}}" for key, width in COLUMNS.items())
    text += "".join(f"  x{gain:.2f}" for gain in gains(row, rows))
    return text + (f"  select {row['select_ms']} ms" if "select_ms" in row else "")


def crossovers(rows: list[Row]) -> list[str]:
    """Where sparsek overtakes cuDNN, interpolated between the two measured lengths around it (log time, log length)."""
    found = []
    measured = [
        (int(str(r["tokens"])), gains(r, rows)) for r in rows if r["side"] == "sparsek" and "error" not in r
    ]
    for index, name in enumerate(("forward", "forward + backward")):
        points = [(math.log2(n), math.log2(g[index])) for n, g in measured if g]
        text = "not between the measured lengths"
        if points and points[0][1] > 0:
            text = f"below {2 ** points[0][0]:.0f} tokens"
        for (x0, y0), (x1, y1) in pairwise(points):
            if y0 <= 0 < y1:
                text = f"about {2 ** (x0 - y0 * (x1 - x0) / (y1 - y0)):.0f} tokens"
        found.append(f"crossover with cudnn, {name}: {text}")
    return found


def plot(rows: list[Row], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, key, label in zip(
        axes, ("forward_ms", "forward_backward_ms"), ("forward", "forward + backward"), strict=True
    ):
        for side in SIDES:
            points = [(r["tokens"], r[key]) for r in rows if r["side"] == side and "error" not in r]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=side)
        axis.set(yscale="log", xlabel="tokens", ylabel="ms", title=label)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << p for p in range(11, 21)])
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--topk", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument(
        "--score-rise",
        type=float,
        metavar="TOKENS",
        help="scores rise by 1 in this many tokens (SparseK's initial slope: topk); default: no slope",
    )
    parser.add_argument(
        "--graph", action="store_true", help="time replays of CUDA graphs: no launch overhead on any side"
    )
    parser.add_argument("--budget-ms", type=float, default=100, help="measuring time per number")
    parser.add_argument("--limit-s", type=float, default=2.0, help="longest call a side is given")
    parser.add_argument(
        "--nsa-all", action="store_true", help="let NSA try all of its configurations (minutes)"
    )
    parser.add_argument("--out", type=Path, default=Path("results"))
    return parse_with_cuda(parser)


def main() -> None:
    args = parse_arguments()
    import torch._functorch.config as functorch_config

    functorch_config.donated_buffer = False  # flex_attention's backward otherwise refuses repeated calls
    title = (
        f"{torch.cuda.get_device_name()}, {args.dtype}, {args.heads}/{args.kv_heads} heads, d {args.dim}, "
        f"topk {args.topk}, window {args.window}, stride {args.stride}{', CUDA graphs' if args.graph else ''}"
        f"{f', scores rise by 1 in {args.score_rise:g} tokens' if args.score_rise else ''}; "
        f"torch {torch.__version__}, triton {triton.__version__}, {datetime.date.today()}"
    )
    print(title)
    if "nsa" in args.sides and not args.nsa_all:
        with contextlib.suppress(ImportError):  # listed with its reason below
            print("NSA tries few configurations:", ", ".join(restrict_nsa_tuning()))
    print(HEADER, flush=True)
    rows: list[Row] = []
    for tokens in args.lengths:
        case = Case(
            tokens,
            args.heads,
            args.kv_heads,
            args.dim,
            args.topk,
            args.window,
            args.stride,
            getattr(torch, args.dtype),
            args.score_rise,
        )
        for name in args.sides:
            reason = too_long(name, tokens, rows, args.limit_s)
            try:
                rows.append(
                    {"tokens": tokens, "side": name, "error": reason}
                    if reason
                    else measure(name, SIDES[name], case, args.budget_ms, args.graph)
                )
            except FAILURES as error:
                text = str(error).strip().splitlines()[0][:100] if str(error) else ""
                rows.append({"tokens": tokens, "side": name, "error": f"{type(error).__name__}: {text}"})
            print(line(rows[-1], rows), flush=True)  # a long run shows what it has
            gc.collect()
            torch.cuda.empty_cache()
    print("\n".join(crossovers(rows)))
    args.out.mkdir(parents=True, exist_ok=True)
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with (args.out / "attention.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, args.out / "attention.png", title)


if __name__ == "__main__":
    main()
