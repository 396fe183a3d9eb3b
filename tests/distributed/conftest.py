# SPDX-License-Identifier: Apache-2.0
"""One torchrun launch of four CPU processes serves every test of this folder that reads `launched`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
RANKS = 4
LIMIT_SECONDS = 400
MODULES = ("cases_parity", "cases_training", "cases_checkpoint", "cases_loss")


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


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """Results of all cases in `MODULES`, run by torchrun over gloo. DISTRIBUTED_CASES (a pattern) picks
    some.
    """
    out = tmp_path_factory.mktemp("distributed") / "results.json"
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={RANKS}", str(HERE / "worker.py"), str(out), *MODULES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = out.with_suffix(".log")
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Launched(json.loads(out.read_text()) if out.exists() else {}, log.read_text())
