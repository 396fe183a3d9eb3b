# SPDX-License-Identifier: Apache-2.0
"""One launch of four CPU processes serves every test of this folder that reads `launched`.

Such a test's module names in LAUNCHED the module of its cases.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
RANKS = 4
LIMIT_SECONDS = 400


class Launched:
    """Results of the cases, by name."""

    def __init__(self, results: dict[str, Any], log: str) -> None:
        self.results = results
        self.log = log

    def __getitem__(self, name: str) -> Any:
        """The case's value; fails the test with the rank's traceback where the case raised."""
        if name not in self.results:
            pytest.fail(f"case {name} did not run:\n{self.log[-4000:]}")
        if "error" in self.results[name]:
            pytest.fail(f"case {name} raised on a rank:\n{self.results[name]['error']}")
        return self.results[name]["value"]


def launch(
    folder: Path, ranks: int, modules: tuple[str, ...], *, on_gpus: bool = False, **changes: str
) -> Launched:
    """Results of the cases of `modules` on forked ranks, on GPUs on torchrun's, with `changes` to the environment."""
    out = folder / "results.json"
    command = [sys.executable, "-W", "ignore"]
    if on_gpus:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    else:
        changes["FORKED_RANKS"] = str(ranks)
    command += [str(HERE / "worker.py"), str(out), *modules]
    log = out.with_suffix(".log")
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", **changes},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Launched(json.loads(out.read_text()) if out.exists() else {}, log.read_text())


@pytest.fixture(scope="session")
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """Results of the cases of all tests that will run, over gloo. DISTRIBUTED_CASES (a pattern) picks some."""
    tests = [item for item in request.session.items if "launched" in getattr(item, "fixturenames", ())]
    modules = sorted({item.module.LAUNCHED for item in tests})  # pyright: ignore[reportAttributeAccessIssue]
    return launch(tmp_path_factory.mktemp("distributed"), RANKS, tuple(modules), CUDA_VISIBLE_DEVICES="")


@pytest.fixture(scope="session")
def launched_on_two(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """Cases that need two processes, over gloo."""
    changes = {"CUDA_VISIBLE_DEVICES": "", "DISTRIBUTED_CASES": "^(agreement_|training_dp$)"}
    return launch(tmp_path_factory.mktemp("two"), 2, ("cases_agreement", "cases_training"), **changes)


@pytest.fixture(scope="session")
def launched_on_eight(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """The case that needs eight processes, over gloo."""
    changes = {"CUDA_VISIBLE_DEVICES": "", "DISTRIBUTED_CASES": "mesh_tp2_cp2_dp2_sp"}
    return launch(tmp_path_factory.mktemp("eight"), 8, ("cases_mesh",), **changes)


@pytest.fixture(scope="session")
def launch_on_gpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Launched]:
    """Runs cases over NCCL: (ranks, module of the cases, a pattern of their names, changes to the environment)."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")

    def launch_cases(ranks: int, module: str, cases: str, **changes: str) -> Launched:
        folder = tmp_path_factory.mktemp("gpus")
        return launch(folder, ranks, (module,), on_gpus=True, DISTRIBUTED_CASES=cases, **changes)

    return launch_cases
