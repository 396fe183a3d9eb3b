#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Two revisions side by side: is B slower than A, and is the answer more than noise?

    python kernels/benchmarks/compare.py main HEAD
    python kernels/benchmarks/compare.py HEAD . --lengths 8192 131072 --fail-above 1.03     # "." is the working tree
    python kernels/benchmarks/compare.py /tmp/before/ .           # another checkout as it is: needs no git

Each revision is unpacked into a temporary folder; this file measures both, so a change to the measuring
code cannot pass for a change of the kernels. Runs are interleaved and change places (A B, B A, A B, ...), each in a
process of its own: clocks that drift and neighbours that come and go meet both. A round gives one ratio B / A per case;
the table shows their median, lowest and highest. With --fail-above a case whose every round is slower than that ends
the program with code 1. Runs on CPU too, where the torch backend is measured.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

OPERATIONS = ("select", "forward", "forward+backward")
REPOSITORY = Path(__file__).resolve().parents[2]


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    where = "git revision, path of a checkout (with a /), or . for the working tree"
    parser.add_argument("a", metavar="A", help=f"what to compare with: {where}")
    parser.add_argument("b", metavar="B", help="what to look at, likewise")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each revision")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--topk", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--budget-ms", type=float, default=100, help="measuring time per number and run")
    parser.add_argument(
        "--fail-above", type=float, metavar="RATIO", help="exit with 1 where B is surely slower"
    )
    parser.add_argument(
        "--measure", action="store_true", help=argparse.SUPPRESS
    )  # one run, in its own process
    return parser


def check(args: argparse.Namespace) -> None:
    """End the program at the first number that would measure nothing, or guard nothing."""
    if args.rounds < 1:
        fail(f"--rounds {args.rounds}: must be at least 1")
    for flag, value in (("--budget-ms", args.budget_ms), ("--fail-above", args.fail_above)):
        if value is not None and not 0 < value < math.inf:
            fail(f"{flag} {value:g}: must be above 0 and finite")
    for tokens in args.lengths:
        if tokens < 1:
            fail(f"--lengths {tokens}: must be at least 1")


def operations(args: argparse.Namespace, tokens: int) -> dict[str, Callable[[], Any]]:
    """What is timed, on the same inputs for every run."""
    import torch
    from sparsek_kernels import select, sparsek_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()

    dtype = getattr(torch, args.dtype)
    query, key, value = (
        draw(1, tokens, heads, args.dim, dtype=dtype) for heads in (args.heads, args.kv_heads, args.kv_heads)
    )
    scores = draw(1, tokens, args.kv_heads, dtype=torch.float32)
    d_out = torch.ones_like(query)
    settings = {"topk": args.topk, "window": args.window, "stride": args.stride}

    def forward() -> torch.Tensor:
        return sparsek_attention(query, key, value, scores, **settings)

    def no_gradient(function: Callable[[], Any]) -> Callable[[], Any]:
        return torch.no_grad()(function)

    return {
        "select": no_gradient(lambda: select(scores.detach(), **settings)),
        "forward": no_gradient(forward),
        "forward+backward": lambda: torch.autograd.grad(forward(), (query, key, value, scores), d_out),
    }


def median_ms(function: Callable[[], Any], budget_ms: float) -> float:
    """Median milliseconds of a call."""
    import torch

    if torch.cuda.is_available():
        import triton

        return float(
            triton.testing.do_bench(function, warmup=budget_ms / 4, rep=budget_ms, return_mode="median")
        )
    function()
    times, began = [], time.perf_counter()
    while not times or 1e3 * (time.perf_counter() - began) < budget_ms:
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One run: milliseconds by case, with the kernels that this process imports."""
    found = {}
    for tokens in args.lengths:
        timed = operations(args, tokens)
        for name in args.operations:
            found[f"{name} {tokens}"] = median_ms(timed[name], args.budget_ms)
    return found


def unpacked(revision: str, folder: Path) -> Path:
    """A folder holding `revision`: `folder` with its files, the working tree, or the checkout that it is a path of."""
    if revision == ".":
        return REPOSITORY
    if "/" in revision and Path(revision).is_dir():
        if not Path(revision, "kernels", "sparsek_kernels").is_dir():
            fail(f"{revision}: no checkout of this project; kernels/sparsek_kernels is not in it")
        return Path(revision).resolve()
    git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", wrong=f"{revision}: no such revision")
    packed = git("archive", "--format=tar", revision, wrong=f"cannot read the files of {revision}")
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        # Not extractall's `filter`, which Python 3.11.0 to 3.11.3 refuse; this attribute they ignore.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder)
    return folder


def git(*command: str, wrong: str) -> bytes:
    """Output of a git command in this repository; ends the program with `wrong` where it fails."""
    done = subprocess.run(["git", "-C", str(REPOSITORY), *command], capture_output=True, check=False)
    if done.returncode:
        fail(f"{wrong} {done.stderr.decode().strip()}".strip())
    return done.stdout


def run(tree: Path, argv: list[str], label: str) -> dict[str, float]:
    """One run of a revision in a process of its own."""
    path = os.pathsep.join([str(tree / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), *argv, "--measure"],
        capture_output=True, text=True, check=False, env=environment, cwd=tree,
    )  # fmt: skip
    if done.returncode:
        fail(f"{label}: the run failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if not Path(found["package"]).resolve().is_relative_to(tree.resolve()):
        fail(
            f"{label}: measured {found['package']} instead; remove that installation from the front of the path"
        )
    return found["times"]


@dataclass(frozen=True)
class Comparison:
    """One case over all rounds."""

    case: str
    a_ms: float  # medians
    b_ms: float
    ratios: tuple[float, ...]  # B / A, one per round

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def slower_than(self, limit: float) -> bool:
        """Whether every round says so."""
        return min(self.ratios) > limit

    def __str__(self) -> str:
        spread = f"{min(self.ratios):.3f} to {max(self.ratios):.3f}"
        return f"{self.case:<26} {self.a_ms:>10.4f} {self.b_ms:>10.4f} {self.ratio:>8.3f}  {spread}"


def compare(rounds: list[tuple[dict[str, float], dict[str, float]]]) -> list[Comparison]:
    """Cases from rounds of (A, B) times in milliseconds."""
    return [
        Comparison(
            case,
            statistics.median(a[case] for a, _ in rounds),
            statistics.median(b[case] for _, b in rounds),
            tuple(b[case] / a[case] for a, b in rounds),
        )
        for case in rounds[0][0]
    ]


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    if args.measure:
        import sparsek_kernels

        print(json.dumps({"package": str(sparsek_kernels.__file__), "times": measure(args)}))
        return 0
    check(args)
    with tempfile.TemporaryDirectory() as scratch:
        trees = [
            unpacked(revision, Path(scratch) / side) for side, revision in (("a", args.a), ("b", args.b))
        ]
        rounds = []
        for number in range(args.rounds):
            times: list[dict[str, float]] = [{}, {}]
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                times[side] = run(trees[side], argv, (args.a, args.b)[side])
            rounds.append((times[0], times[1]))
            print(f"round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
    print(f"{'case':<26} {'A ms':>10} {'B ms':>10} {'B / A':>8}  lowest to highest of {args.rounds} rounds")
    compared = compare(rounds)
    for each in compared:
        print(each)
    limit = args.fail_above
    slower = [each.case for each in compared if limit is not None and each.slower_than(limit)]
    if slower:
        print(f"slower than {limit} in every round: {', '.join(slower)}")
    return 1 if slower else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was unpacked is removed then too
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
