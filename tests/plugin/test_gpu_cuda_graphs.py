# SPDX-License-Identifier: Apache-2.0
"""megatron-core's own CUDA graphs, a graph per layer and one of the whole iteration, train as the eager model does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu
HERE = Path(__file__).resolve().parent


def train(implementation: str, folder: Path) -> dict[str, Any]:
    """What `cuda_graph_program.py` prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(HERE / "cuda_graph_program.py"),
        implementation,
        str(folder),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train("none", tmp_path_factory.mktemp("eager"))


@pytest.mark.parametrize("implementation", ["local", "full_iteration"])
def test_captured_training_follows_eager_training(
    implementation: str, eager: dict[str, Any], tmp_path: Path
) -> None:
    got = train(implementation, tmp_path)
    assert got["captured"] > 0 and eager["captured"] == 0
    assert eager["losses"][-1] < eager["losses"][0] - 0.3, "the weights move between replays"
    assert got["losses"] == pytest.approx(eager["losses"], rel=5e-3)
    assert got["scorer_gradients"] == pytest.approx(eager["scorer_gradients"], rel=5e-2)
