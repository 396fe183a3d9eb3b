# SPDX-License-Identifier: Apache-2.0
"""launch/slurm.sbatch under a real Slurm: a checkpoint before the time limit, back into the queue, and job arrays.

Needs root, slurm-wlm and munge; runs where the ordinary suite does not: `pytest -m slow tests/faults`.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from lives import flags
from programs import REPOSITORY, environment, run
from slurm_cluster import NotHere, cluster

from sparsek_megatron.training.report import read_metrics

pytestmark = pytest.mark.slow

STEPS = 80
LAYOUT = "--tensor-model-parallel-size 2 --sequence-parallel"
LONGEST_SECONDS = 300


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    try:
        with cluster(tmp_path_factory.mktemp("slurm")) as settings:
            yield settings
    except NotHere as reason:
        pytest.skip(f"Slurm: {reason}")


@pytest.fixture(scope="module")
def straight(prepared, tmp_path_factory) -> list[dict]:
    """Records of the uninterrupted run."""
    save = tmp_path_factory.mktemp("straight") / "run"
    run("pretrain_gpt.py", "--nproc-per-node", "2", *job_flags(prepared, save))
    return read_metrics(save)


def job_flags(prepared, save: Path) -> list[str]:
    return flags(prepared, save, steps=STEPS, save_interval=1000, layout=LAYOUT)


def submit(slurm: dict[str, str], folder: Path, arguments: list[str], *options: str) -> str:
    """Submit the job; its number."""
    settings = slurm | environment() | {"PATH": f"{Path(sys.executable).parent}:{slurm['PATH']}", "NPROC_PER_NODE": "2"}
    command = ["sbatch", "--parsable", "--nodes=1", "--cpus-per-task=2", f"--output={folder}/job.out", *options]
    submitted = subprocess.run(
        [*command, "launch/slurm.sbatch", "examples/pretrain_gpt.py", *arguments],
        env=settings, cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    return submitted.stdout.strip()


def wait_until(condition, what: str, folder: Path, *, seconds: float = LONGEST_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        log = folder / "job.out"
        assert time.monotonic() < deadline, f"no {what}:\n{log.read_text()[-4000:] if log.exists() else ''}"
        time.sleep(0.1)


def queued(slurm: dict[str, str], job: str) -> bool:
    listed = subprocess.run(["squeue", "-h", "-j", job], env=slurm, capture_output=True, text=True)
    return bool(listed.stdout.strip())


def taken(save: Path) -> int:
    return max((record["step"] for record in read_metrics(save)), default=0)


def time_is_up(slurm: dict[str, str], job: str) -> None:
    """What `--signal=B:USR1` does ahead of the time limit."""
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], env=slurm, check=True)


def test_before_the_time_limit_the_job_saves_goes_back_into_the_queue_and_finishes_bitwise(
    slurm, prepared, straight, tmp_path
):
    save = tmp_path / "run"
    job = submit(slurm, tmp_path, job_flags(prepared, save))
    wait_until(lambda: taken(save) >= 5, "step 5", tmp_path)
    time_is_up(slurm, job)
    wait_until(lambda: "back into the queue" in (tmp_path / "job.out").read_text(), "requeue", tmp_path)
    stopped = int((save / "latest").read_text()[5:])
    assert 5 <= stopped < STEPS
    wait_until(lambda: not queued(slurm, job), "end of the job", tmp_path)
    said = (tmp_path / "job.out").read_text()
    assert f"stopped by SIGUSR1 after step {stopped}" in said and f"from step {stopped}" in said, said
    assert "start 1:" in said and "start 2:" in said
    assert read_metrics(save) == straight, said


def test_the_next_job_of_an_array_goes_on_where_the_last_one_stopped(slurm, prepared, straight, tmp_path):
    save = tmp_path / "run"
    job = submit(slurm, tmp_path, job_flags(prepared, save), "--array=1-2%1")
    wait_until(lambda: taken(save) >= 5, "step 5", tmp_path)
    time_is_up(slurm, f"{job}_1")
    wait_until(lambda: not queued(slurm, job), "end of the array", tmp_path)
    said = (tmp_path / "job.out").read_text()
    assert "the array's next job goes on" in said and "resuming" in said, said
    assert read_metrics(save) == straight, said
