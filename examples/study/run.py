#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run one table of the study: every arm and seed, then CSV, plots and a Markdown table.

    python examples/study/run.py budget_4k --jobs 18 --seconds 150   # all runs side by side until the time is spent
    python examples/study/run.py recall --micro                      # seconds on a CPU, to see that it runs

Runs are processes that share the visible GPUs. Finished runs are kept: the same command continues where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
)  # asking for GPUs must not start CUDA before a fork

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from sparsek_megatron.quiet import quiet_dependencies  # noqa: E402

quiet_dependencies()  # before megatron-core is imported

from arms import Arm, Model, Table  # noqa: E402
from data import NAMES, Corpus, make  # noqa: E402
from pace import Pace  # noqa: E402
from tables import TABLES  # noqa: E402
from train import Run, train  # noqa: E402

from sparsek_megatron.errors import UserError, report_user_errors  # noqa: E402


def micro_arm(arm: Arm) -> Arm:
    """The arm with a sixteenth of the keys."""
    old = arm.sparsek
    topk, window = max(1, old.topk // 16), max(1, old.window // 16)
    pool = topk if old.hard_selection else max(topk + 1, (old.pool or 0) // 16)
    stride = max(1, old.stride // 16)
    return dataclasses.replace(
        arm,
        sparsek=dataclasses.replace(old, topk=topk, window=window, stride=stride, pool=pool),
        length=arm.length and arm.length // 16,
    )


def micro(table: Table) -> Table:
    """The table small enough to check on a CPU that it runs; its numbers mean nothing."""
    length = table.length if table.data == "lookup_many" else max(256, table.length // 16)
    return dataclasses.replace(
        table,
        arms=tuple(micro_arm(arm) for arm in table.arms),
        length=length,
        tokens_per_step=2 * length,
        steps=3,
        model=Model(min(2, table.model.num_layers), 32, 48, 2, 2),
        eval_lengths=tuple(n // 16 for n in table.eval_lengths),
        evaluation_tokens=4 * length,
        far=table.far // 16,
    )


def _finished(run: Run) -> bool:
    return run.log.is_file() and '"kind": "evaluation"' in run.log.read_text()


_pace: Pace | None = None


def _start_worker(gpus: Any, pace: Pace | None) -> None:
    global _pace
    _pace = pace
    torch.set_num_threads(1)
    gpu = gpus.get()
    if torch.cuda.is_available():
        torch.cuda.set_device(gpu)


def _train(run: Run) -> Path:
    return train(run, _pace)


def _use_a_gpu() -> None:
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")


def _context() -> Any:
    """Processes that start with this one's imports; fresh ones where CUDA or a process group forbids that."""
    if torch.distributed.is_initialized():
        return multiprocessing.get_context("spawn")
    forked = multiprocessing.get_context("fork")
    probe = forked.Process(target=_use_a_gpu)
    probe.start()
    probe.join()
    return forked if probe.exitcode == 0 else multiprocessing.get_context("spawn")


def _run_all(runs: list[Run], jobs: int, deadline: float | None) -> int:
    """Run what is not finished, `jobs` at a time, or all until the deadline; returns how many failed."""
    waiting = [run for run in runs if not _finished(run)]
    if not waiting:
        return 0
    if deadline is not None and jobs < len(waiting):
        raise UserError(
            f"--jobs {jobs}: with --seconds all {len(waiting)} runs go side by side; give --jobs that many"
        )
    if jobs == 1 and deadline is None:  # in this process
        return sum(_report(run, lambda run=run: train(run), time.time()) for run in waiting)
    context = _context()
    pace = Pace(context, len(waiting), deadline) if deadline is not None else None
    jobs = min(jobs, len(waiting))
    gpus = context.Queue()  # each worker takes one, so that all visible GPUs are used
    for worker in range(jobs):
        gpus.put(worker % max(1, torch.cuda.device_count()))
    with ProcessPoolExecutor(jobs, context, _start_worker, (gpus, pace)) as pool:
        began = time.time()
        futures = {pool.submit(_train, run): run for run in waiting}
        return sum(_report(futures[future], future.result, began) for future in as_completed(futures))


def _report(run: Run, result: Callable[[], object], began: float) -> bool:
    """Print how a run ended; whether it failed."""
    try:
        result()
    except Exception as error:  # the other runs go on, and the command's exit status says so
        outcome = f"FAILED: {type(error).__name__}: {error}"
    else:
        outcome = "done"
    print(f"{time.time() - began:6.0f} s  {run.arm.name}, seed {run.seed}: {outcome}", flush=True)
    return outcome != "done"


def _take(runs: list[Run], source: Path) -> None:
    """Copy finished runs that other arms start from, log and weights, from the folder of another table.

    Raises:
        UserError: one of them is not finished there, or trained other settings than this table's.
    """
    for run in (run for run in runs if not _finished(run)):
        other = dataclasses.replace(run, folder=source)
        if not (_finished(other) and other.weights.is_file()):
            raise UserError(f"--pretrained {source}: no finished {run.arm.name}, seed {run.seed}, with weights there")
        found = json.loads(other.log.read_text().splitlines()[0])
        asked = {
            "arm": json.loads(json.dumps(dataclasses.asdict(run.arm))),
            "model": dataclasses.asdict(run.settings.model),
            "length": run.arm.length or run.settings.length,
            "learning_rate": run.settings.learning_rate * run.arm.rate,
        }
        for name, value in asked.items():
            if found.get(name) != value:
                raise UserError(f"--pretrained {source}: {name} was {found.get(name)} there and is {value} here")
        run.folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(other.weights, run.weights)
        shutil.copy(other.log, run.log)  # last: a run with a finished log is finished


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, help="training steps of every arm; default the table's")
    parser.add_argument("--jobs", type=int, default=4, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--data", choices=NAMES, help="train on this instead of the table's own data")
    parser.add_argument(
        "--input", nargs="*", default=[], help="text files or folders; default the standard library"
    )
    parser.add_argument("--include", default="*", help="files to read in those folders, like '*.py'")
    parser.add_argument("--arms", default="", help="only arms whose name matches this regular expression")
    parser.add_argument(
        "--packages", nargs="*", default=[], help="installed Python packages whose sources are read besides"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="a SentencePiece model; default trains one on the text"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        nargs="+",
        help="train until this many seconds after the start instead of for a number of steps; a second number is for "
        "the arms that start from another's weights",
    )
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--save", action="store_true", help="keep the weights of every run")
    parser.add_argument(
        "--pretrained",
        type=Path,
        help="folder of another table of this study whose pretrained weights this one starts from, instead of its own",
    )
    parser.add_argument("--micro", action="store_true", help="a size for a CPU, to see that it runs")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.jobs < 1 or (args.steps is not None and args.steps < 1):
        raise UserError(f"--jobs {args.jobs}, --steps {args.steps}: both must be at least 1")
    table = micro(TABLES[args.table]) if args.micro else TABLES[args.table]
    picked = [arm for arm in table.arms if re.search(args.arms, arm.name)]
    needed = {arm.start for arm in picked}
    arms = tuple(arm for arm in table.arms if arm in picked or arm.name in needed)
    if not arms:
        raise UserError(
            f"--arms {args.arms}: no arm of {args.table}; it has {', '.join(a.name for a in table.arms)}"
        )
    table = dataclasses.replace(
        table, arms=arms, steps=args.steps or table.steps, data=args.data or table.data
    )
    name = "-".join([args.table, *([args.data] if args.data else []), *(["micro"] if args.micro else [])])
    folder = args.out / name
    began = time.time()
    deadlines = [began + seconds for seconds in args.seconds or ()]
    corpus = Corpus(tuple(args.input), args.include, tuple(args.packages), args.tokenizer)

    def runs_of(chosen: list[Arm]) -> list[Run]:
        return [
            Run(args.table, arm, seed, table, folder, corpus, args.save, args.eager)
            for seed in args.seeds
            for arm in chosen
        ]

    first, second = (runs_of([arm for arm in arms if (arm.start is None) == alone]) for alone in (True, False))
    if args.pretrained is not None:
        _take([run for run in first if run.arm.name in needed], args.pretrained)
    whole = [part for part in (first, second) if part]
    parts = [part for part in whole if not all(_finished(run) for run in part)]
    if deadlines and len(deadlines) not in (len(whole), len(parts)):
        raise UserError(
            f"--seconds {' '.join(map(str, args.seconds))}: {args.table} has {len(parts)} parts to run, one after the "
            "other; give a time for the end of each"
        )
    ends = deadlines[-len(parts) :] if deadlines and parts else [None] * len(parts)
    make(table.data, corpus, folder.parent / "data")  # encodes the text once, before the workers need it
    failed = sum(_run_all(part, args.jobs, end) for part, end in zip(parts, ends, strict=True))
    from report import write

    print(write(table, folder, args.seeds), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    with report_user_errors():
        sys.exit(main())
