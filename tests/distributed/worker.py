# SPDX-License-Identifier: Apache-2.0
"""All registered cases on every rank of one launch, results written as JSON by rank 0.

`worker.py OUT MODULE...` is a rank of torchrun's, which GPUs need; with FORKED_RANKS in the environment it forks
that many. A case is a function of no arguments that returns something JSON can hold; an exception on any rank becomes
the case's "error". Its numbers are errors, of which the worst rank's count (`worst`).
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "plugin"), str(HERE.parent)]

from forked_ranks import run_ranks  # noqa: E402

CASES: dict[str, Callable[[], Any]] = {}


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    """Register a case under its function's name."""
    CASES[function.__name__] = function
    return function


def worst(answers: list[Any]) -> Any:
    """One answer of all ranks: of each number the largest, inf for nan; everything else must be the same on all.

    A rank that is right must not stand for one that is wrong. Raises ValueError where ranks answer something else.
    """
    first = answers[0]
    if all(isinstance(x, dict) and x.keys() == first.keys() for x in answers):
        return {key: worst([x[key] for x in answers]) for key in first}
    if all(isinstance(x, (list, tuple)) and len(x) == len(first) for x in answers):
        return [worst(list(x)) for x in zip(*answers, strict=True)]
    if all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in answers):
        return max(math.inf if math.isnan(x) else x for x in answers)
    if any(x != first for x in answers):
        raise ValueError(f"ranks answer differently: {answers}")
    return first


def main(out: str, *modules: str) -> None:
    for module in modules:
        importlib.import_module(module)
    if "FORKED_RANKS" in os.environ:
        run_ranks(lambda: run_cases(out, modules), int(os.environ["FORKED_RANKS"]))
    else:
        run_cases(out, modules)


def run_cases(out: str, modules: tuple[str, ...]) -> None:
    import torch
    from mcore_harness import start_process_group

    start_process_group()
    wanted = os.environ.get("DISTRIBUTED_CASES", "")
    results = {}
    for name, function in sys.modules["worker"].CASES.items():
        if function.__module__ not in modules or not re.search(wanted, name):
            continue
        began = time.time()
        try:
            answer = {"value": function()}
        except Exception:
            answer = {"error": traceback.format_exc()}
            print(f"case {name}: {answer['error']}", flush=True)  # the others may be waiting for this rank
        answers: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(answers, answer)
        failed = [a for a in answers if "error" in a]
        try:
            results[name] = failed[0] if failed else {"value": worst([a["value"] for a in answers])}
        except ValueError:
            results[name] = {"error": traceback.format_exc()}
        results[name]["seconds"] = time.time() - began
        if torch.distributed.get_rank() == 0:
            print(f"case {name}: ended after {results[name]['seconds']:.1f} s", flush=True)
    if torch.distributed.get_rank() == 0:
        Path(out).write_text(json.dumps(results))
    torch.distributed.barrier()
    if torch.cuda.is_available():
        os._exit(0)  # taking the NCCL communicators of all cases down takes minutes on four GPUs
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.modules["worker"] = sys.modules["__main__"]
    main(*sys.argv[1:])
