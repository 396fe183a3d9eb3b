# SPDX-License-Identifier: Apache-2.0
"""Which (tp, cp, pp, dp, ZeRO stage) to train a long-context model with, by a cost model: a table, and why.

    python examples/plan_parallelism.py --models 7B 70B 405B --gpus 8 64 512 4096 --tokens 131072 1048576 16777216
    python examples/plan_parallelism.py --calibrate scaling/results.csv   # measured steps first

The model is `sparsek_megatron.planning`; nothing here has been run at the sizes that it predicts.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
from pathlib import Path

from sparsek_megatron.errors import UserError, report_user_errors
from sparsek_megatron.flags import FlagParser
from sparsek_megatron.planning import H200, MODELS, Machine, Run, best_layout
from sparsek_megatron.planning.calibration import calibrate
from sparsek_megatron.planning.search import layouts


def parse() -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1 << 17, 1 << 20, 1 << 24], help="of one sequence"
    )
    parser.add_argument("--batch-tokens", type=int, default=1 << 24, help="tokens of one optimizer step")
    parser.add_argument(
        "--calibrate", type=Path, help="results.csv of examples/benchmark_scaling.py on such GPUs"
    )
    parser.add_argument("--fast-gb", type=float, default=H200.fast / 1e9, help="GB/s per GPU within a node")
    parser.add_argument("--slow-gb", type=float, default=H200.slow / 1e9, help="GB/s per GPU between nodes")
    args = parser.parse_args()
    numbers = {
        "--gpus": args.gpus,
        "--tokens": args.tokens,
        "--batch-tokens": [args.batch_tokens],
        "--fast-gb": [args.fast_gb],
        "--slow-gb": [args.slow_gb],
    }
    for flag, values in numbers.items():
        for value in values:
            if not 0 < value < math.inf:
                parser.error(f"{flag} {value}: must be {'greater than 0' if value <= 0 else 'finite'}")
    return args


def calibrated(results: Path, machine: Machine) -> Machine:
    """The machine fitted to measured steps, with its error at each of them printed."""
    try:
        with results.open(newline="") as file:
            fitted, compared = calibrate(list(csv.DictReader(file)), machine)
    except OSError as err:
        raise UserError(f"--calibrate {results}: cannot read it ({err.strerror})") from None
    except (ValueError, csv.Error) as err:
        raise UserError(f"--calibrate {results}: {err}") from None
    print(
        f"calibrated: matrix products at {fitted.matmul:.1%} of {machine.peak / 1e12:.0f} TFLOP/s, "
        f"{fitted.fast / 1e9:.1f} GB/s within a node, {fitted.exchange * 1e3:.3f} ms a collective of an exchange"
    )
    for name, measured, predicted in compared:
        print(f"  {name}: measured {measured * 1e3:.1f} ms, predicted {predicted * 1e3:.1f} ms "
              f"({predicted / measured - 1:+.1%})")  # fmt: skip
    return fitted


def main() -> None:
    args = parse()
    machine = dataclasses.replace(H200, fast=args.fast_gb * 1e9, slow=args.slow_gb * 1e9)
    if args.calibrate:
        machine = calibrated(args.calibrate, machine)
    print(
        "| model | GPUs | tokens | tp | cp | pp | dp | ZeRO | recompute | tokens/s/GPU | communication | bubble | GiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name in args.models:
        for gpus in args.gpus:
            for tokens in args.tokens:
                model, run = MODELS[name], Run(tokens, max(args.batch_tokens, tokens))
                plan = best_layout(model, run, gpus, machine)
                where = f"| {name} | {gpus:,} | {tokens:,} |"
                if plan is None:
                    reason = "does not fit"
                    if not layouts(model, run, gpus, machine):
                        reason = f"no layout divides {run.sequences:,} sequences and {model.layers} layers"
                    print(f"{where} {reason} | | | | | | | | | |")
                    continue
                at, cost = plan.layout, plan.cost
                talking = (cost.tensor + cost.context + cost.pipeline + cost.data) / cost.seconds
                recompute = "full" if at.recompute else "none"
                print(
                    f"{where} {at.tp} | {at.cp} | {at.pp} | {at.dp} | {at.zero} | {recompute} | "
                    f"{plan.tokens_per_second(run) / gpus:,.0f} | {talking:.0%} | {cost.bubble / cost.seconds:.0%} | "
                    f"{cost.memory / 2**30:.0f} |"
                )


if __name__ == "__main__":
    with report_user_errors():
        main()
