#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a training step of each arm of a table costs alone on one GPU: time and peak memory, one arm after the other.

    python examples/study/overhead.py ablations
    python examples/study/overhead.py budget_4k --arms "dense|SparseK"

Steps are the study's own, replayed CUDA graphs on batches of the table's shape. Tokens are random and drawn once, and
weights are fresh: launches, their sizes and memory depend on shapes only. What scores do change is how long selection
searches and how many keys a part of the backward pass visits; here they are an untrained scorer's. Arms of another
length than the table's (what the others start from) are left out.
"""

from __future__ import annotations

import argparse
import csv
import gc
import re
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from sparsek_megatron.quiet import quiet_dependencies  # noqa: E402

quiet_dependencies()  # before megatron-core is imported

from arms import Arm, Table  # noqa: E402
from data import Batch, Corpus, Text, generator, make  # noqa: E402
from model import build, start_megatron  # noqa: E402
from run import micro  # noqa: E402
from steps import EAGER_STEPS, Stepper, rate_factor  # noqa: E402
from tables import TABLES  # noqa: E402
from train import batch_shape, stepper_for  # noqa: E402

from sparsek_megatron.errors import UserError, report_user_errors  # noqa: E402
from sparsek_megatron.files import atomic_write, require_writable_folder  # noqa: E402

COLUMNS = (
    "table", "arm", "sequences", "length", "step_ms", "step_ms_min", "step_ms_max", "tokens_per_second",
    "times_reference", "peak_mib", "steps", "repeats", "device", "torch",
)  # fmt: skip


def take(stepper: Stepper, batch: Batch, steps: int) -> float:
    """Seconds per step, from an idle GPU until it is idle again."""
    on_gpu = stepper.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        stepper.step(batch, rate_factor(stepper.taken, 0.0))
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def measure(name: str, table: Table, arm: Arm, steps: int, repeats: int) -> dict[str, Any]:
    """The arm's row: milliseconds per step (median, least and most of the repeats), and the peak of what PyTorch
    allocated for it in MiB (model, optimizer, activations of eager and captured steps, the CUDA graph's pool), above
    what was there before.
    """
    device = start_megatron(1)
    on_gpu = device.type == "cuda"
    gc.collect()  # the arm before, and with it its graph's memory
    before = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    # The text itself is not needed to know its vocabulary.
    vocabulary = Text.vocabulary if table.data == "text" else make(table.data, Corpus(), Path()).vocabulary
    size, length = batch_shape(arm, table)
    stepper = stepper_for(build(arm, table, vocabulary, device), arm, table)
    tokens = torch.randint(0, vocabulary, (size, length + 1), generator=generator(1))
    batch = Batch(tokens, torch.ones(size, length))
    take(stepper, batch, EAGER_STEPS + 2)  # compiles kernels, captures the graph and replays it
    if on_gpu and stepper.graph is None:
        raise RuntimeError(f"no CUDA graph after {stepper.taken} steps")
    each = [1e3 * take(stepper, batch, steps) for _ in range(repeats)]
    stepper.mean_loss()  # raises unless finite
    return {
        "table": name,
        "arm": arm.name,
        "sequences": size,
        "length": length,
        "step_ms": median(each),
        "step_ms_min": min(each),
        "step_ms_max": max(each),
        "tokens_per_second": 1e3 * size * length / median(each),
        "peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20 if on_gpu else None,
        "steps": steps,
        "repeats": repeats,
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "torch": torch.__version__,
    }


def line(row: dict[str, Any]) -> str:
    """The row as it is printed."""
    ratio, peak = row["times_reference"], row["peak_mib"]
    return (
        f"{row['arm']:50s} {row['step_ms']:9.3f} ms/step ({row['step_ms_min']:.3f}..{row['step_ms_max']:.3f})"
        f" {row['tokens_per_second']:12,.0f} tokens/s"
        + ("" if ratio is None else f"  {ratio:.3f} x the reference")
        + ("" if peak is None else f"  peak {peak:,.0f} MiB")
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("--arms", default="", help="only arms whose name matches this regular expression")
    parser.add_argument("--steps", type=int, default=20, help="steps timed together")
    parser.add_argument("--repeats", type=int, default=5, help="times that so many steps are timed")
    parser.add_argument("--out", type=Path, help="CSV file; default runs/study/overhead-TABLE.csv")
    parser.add_argument("--micro", action="store_true", help="a size for a CPU, to see that it runs")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.repeats < 1:
        raise UserError(f"--steps {args.steps}, --repeats {args.repeats}: both must be at least 1")
    table = micro(TABLES[args.table]) if args.micro else TABLES[args.table]
    arms = [arm for arm in table.arms if arm.length is None]
    picked = [arm for arm in arms if re.search(args.arms, arm.name)]
    if not picked:
        raise UserError(
            f"--arms {args.arms}: no arm of {args.table}; it has {', '.join(a.name for a in arms)}"
        )
    name = f"{args.table}-micro" if args.micro else args.table
    out: Path = args.out or Path(f"runs/study/overhead-{name}.csv")
    require_writable_folder(out.parent, "--out")
    rows: list[dict[str, Any]] = []
    base, failed = None, 0
    for arm in sorted(picked, key=lambda arm: arm.name != table.reference):  # the reference first
        try:
            row = measure(name, table, arm, args.steps, args.repeats)
        except Exception as error:  # the other arms go on, and the command's exit status says so
            print(f"{arm.name}: FAILED: {type(error).__name__}: {error}", flush=True)
            failed += 1
            continue
        if arm.name == table.reference:
            base = row["step_ms"]
        rows.append({**row, "times_reference": None if base is None else row["step_ms"] / base})
        print(line(rows[-1]), flush=True)
        with atomic_write(out) as stream:
            writer: csv.DictWriter[str] = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return 1 if failed else 0


if __name__ == "__main__":
    with report_user_errors():
        sys.exit(main())
