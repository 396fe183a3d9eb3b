# SPDX-License-Identifier: Apache-2.0
"""All registered cases on every rank of one launch, results written as JSON by rank 0.

`worker.py OUT MODULE...` is a rank of torchrun's, which GPUs need; with FORKED_RANKS in the environment it forks
that many. A case is a function of no arguments that returns something JSON can hold; an exception on any rank becomes
the case's "error".
"""

from __future__ import annotations

import importlib
import json
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
        results[name] = {**(failed or answers)[0], "seconds": time.time() - began}
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
