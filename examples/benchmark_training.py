#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Full training steps (forward, backward, optimizer) with dense, sliding-window and SparseK attention in one run.

    python examples/benchmark_training.py --shape 1.3b --num-layers 4 --tokens 32768 131072
    torchrun --nproc-per-node 4 examples/benchmark_training.py --shape 8b --tensor-model-parallel-size 4 --tokens 131072
    python examples/benchmark_training.py --plot examples/results/training.csv

Random weights, real tokens, one sequence a step on each data-parallel rank. Each case takes `--warmup` steps, then
`--steps` timed ones, then one under the profiler, which gives each kernel to a part of the step. An arm that
runs out of memory says so and skips longer contexts; on several ranks it ends the run, which names the cases that are
left. Writes training.csv and training.png into --out.
"""

from __future__ import annotations

import os

from sparsek_megatron.errors import UserError, report_user_errors
from sparsek_megatron.quiet import quiet_dependencies
from sparsek_megatron.training.launcher import order_launches


def main() -> None:
    from training_benchmark.flags import build_parser

    args = build_parser((__doc__ or "").splitlines()[0]).parse_args()
    if args.plot:
        from training_benchmark.plot import plot

        plot(args.plot, args.plot.with_suffix(".png"))
        return
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        raise UserError(
            "torchrun has started this benchmark again after it ended: a second run would replace its rows; what ended "
            "it is above (torchrun --max-restarts 0, or MAX_RESTARTS=0 for launch/torchrun.sh, starts it once)"
        )
    order_launches(
        args.tensor_model_parallel_size * args.context_parallel_size, in_pieces=args.async_tensor_parallel
    )
    from training_benchmark.runner import Benchmark

    Benchmark(args).run()


if __name__ == "__main__":
    quiet_dependencies()
    with report_user_errors():
        main()
