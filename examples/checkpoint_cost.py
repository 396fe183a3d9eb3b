#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What its background checkpoints cost a run of pretrain_gpt.py, from the times in its metrics.jsonl.

    python examples/checkpoint_cost.py runs/mine                  # of a run with --save-interval 100 or more
    python examples/checkpoint_cost.py runs/mine --steps 200      # 400 or more

Per checkpoint: what training waited for it, and the next --steps steps against as many before and after them,
which carry none; with neighbours on both sides a slow drift of the machine cancels. The first 5 steps after a start
are nobody's neighbours. The percentage is what a checkpoint every --steps steps costs, provided that it is written
within them: the run's log says "written in N s". Its 95 % interval takes checkpoints as independent: less than three
times --steps apart they share neighbours, and it is somewhat too narrow.

The run may be under way. A checkpoint that no step follows, such as the last one, is not seen. Give a multiple of the
run's --log-interval as --steps: the steps that look at the selection take longer, and are then as many on each side.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsek_megatron.quiet import quiet_dependencies

quiet_dependencies()

from sparsek_megatron.errors import UserError, report_user_errors  # noqa: E402
from sparsek_megatron.flags import FlagParser  # noqa: E402
from sparsek_megatron.training.checkpoint_cost import (  # noqa: E402
    WARM_UP,
    Cost,
    begun,
    checkpoint_costs,
    mean_and_margin,
    slowest_steps,
)
from sparsek_megatron.training.report import METRICS, read_metrics  # noqa: E402

SLOWEST = 3


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="the run's --save")
    parser.add_argument("--steps", type=int, default=50, help="that carry a checkpoint (default 50)")
    args = parser.parse_args(arguments)
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: must be at least 2")
    return args


def measured(folder: Path, steps: int) -> tuple[list[Cost], int]:
    """Costs of the run's checkpoints, and how many it has begun."""
    path = folder / METRICS
    if not path.is_file():
        raise UserError(f"{folder}: there is no {METRICS}; give the --save folder of a run of pretrain_gpt.py")
    records = read_metrics(folder, health=True)
    saves = begun(records)
    count = sum(map(len, saves))
    if not count:
        raise UserError(
            f"{path}: no step follows a checkpoint, or the run is older than these records; train with --save-interval "
            f"{2 * steps}, {3 * steps} steps or more"
        )
    apart = max((b - a for life in saves for a, b in itertools.pairwise(life)), default=2 * steps)
    if apart < 2 * steps:
        fewer = f", or give --steps {apart // 2}" if apart >= 4 else ""
        raise UserError(
            f"{path}: checkpoints at most {apart} steps apart are too close for --steps {steps}; train with "
            f"--save-interval {2 * steps}{fewer}"
        )
    costs = checkpoint_costs(records, steps)
    if not costs:
        raise UserError(f"{path}: {_left_out(count, count, steps)}; give a smaller --steps, or train for longer")
    return costs, count


def _left_out(left_out: int, count: int, steps: int) -> str:
    return (
        f"{left_out} of {count} checkpoints left out: fewer than {steps} steps of their own after them, or than "
        f"{(steps + 1) // 2} on either side that carry none; the first {WARM_UP} after a start count as neither"
    )


def show(costs: list[Cost], count: int, steps: int) -> None:
    print("| checkpoint of step | waited, ms | step after it, ms over base | each of "
          f"{steps} steps, ms over base | base, ms | neighbours before, after | % |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for each in costs:
        over = [1e3 * (seconds - each.base) for seconds in each.carrying]
        print(
            f"| {each.step:,} | {1e3 * each.waited:.1f} | {over[0]:.1f} | {sum(over) / steps:.2f} | "
            f"{1e3 * each.base:.1f} | {each.before}, {each.after} | {each.share:.2%} |"
        )
    print()
    for slow in slowest_steps(costs, SLOWEST):
        print(
            f"slowest: step {slow.step:,}, {1e3 * slow.over:.1f} ms over base, {slow.since:.1f} s after the "
            f"checkpoint of step {slow.save:,} began"
        )
    if count > len(costs):
        print(_left_out(count - len(costs), count, steps))
    if one_sided := sum(not (each.before and each.after) for each in costs):
        print(f"{one_sided} of {len(costs)} with neighbours on one side only: a drift of the machine does not cancel")
    longest = steps * min(each.base for each in costs)
    print(f'holds for checkpoints that are written within {longest:.1f} s (the run\'s log: "written in N s")')
    mean, margin = mean_and_margin([each.share for each in costs])
    interval = (
        "one checkpoint, no interval" if margin is None
        else f"95 % interval {mean - margin:.2%} to {mean + margin:.2%}, {len(costs)} checkpoints"
    )  # fmt: skip
    print(f"a checkpoint every {steps} steps costs {mean:.2%} ({interval})")


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    show(*measured(args.folder, args.steps), args.steps)


if __name__ == "__main__":
    with report_user_errors():
        main(sys.argv[1:])
