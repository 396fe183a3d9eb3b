# SPDX-License-Identifier: Apache-2.0
"""Layouts of two processes train as one process does: tensor and data parallel, every ZeRO stage, and resumed."""

import json
from pathlib import Path

import pytest
from programs import finish, start_module

WORKER = str(Path(__file__).with_name("parallel_worker.py"))
STEPS = 4


def run_worker(processes: int, cases: dict) -> dict:
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--nproc-per-node={processes}"]
    output = finish(start_module("torch.distributed.run", *rendezvous, WORKER, json.dumps(cases)))
    line = next(line for line in output.splitlines() if line.startswith("RESULTS "))
    return json.loads(line.removeprefix("RESULTS "))


@pytest.fixture(scope="module")
def results(prepared, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("layouts")

    def case(name: str, *flags: str, resume_at: int | None = None) -> dict:
        argv = [
            *prepared.flags(folder / name), "--global-batch-size", "4", "--train-iters", str(STEPS),
            "--load", str(folder / name), "--save-interval", "2", "--eval-interval", "3", "--eval-iters", "1",
            "--lr", "1e-3", "--clip-grad", "0.5", "--micro-batch-size", "1", *flags,
        ]  # fmt: skip
        (folder / name).mkdir(exist_ok=True)
        return {"argv": argv, "resume_at": resume_at}

    two = {f"zero{stage}": case(f"zero{stage}", "--zero-stage", str(stage), resume_at=2) for stage in (0, 1, 2, 3)}
    tensor = ("--tensor-model-parallel-size", "2")
    two |= {"tp": case("tp", *tensor), "tp_sp": case("tp_sp", *tensor, "--sequence-parallel")}
    return run_worker(1, {"one": case("one")}) | run_worker(2, two)


@pytest.mark.parametrize("layout", ["zero0", "zero1", "zero2", "zero3", "tp", "tp_sp"])
def test_losses_and_gradient_norms_are_those_of_one_process(results, layout):
    straight = results[layout][: STEPS + 3]
    for (loss, norm), (want_loss, want_norm) in zip(straight, results["one"], strict=True):
        assert loss == pytest.approx(want_loss, abs=2e-5)
        assert norm == pytest.approx(want_norm, rel=1e-3)
    assert max(norm for _, norm in straight) > 0.5, "the clipping must be in force to be compared"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_resumes_bitwise(results, stage):
    records = results[f"zero{stage}"]
    split = records.index("resumed")
    straight, resumed = records[:split], records[split + 1 :]
    assert len(resumed) == 4  # steps 3 and 4, and the validations after each
    assert straight[-4:] == resumed
