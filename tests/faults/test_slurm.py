# SPDX-License-Identifier: Apache-2.0
"""launch/slurm.sbatch under a real Slurm: a checkpoint before the time limit or on preemption, the queue, job arrays.

Needs root, slurm-wlm and munge; runs where the ordinary suite does not: `pytest -m slow tests/faults`.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import slurm_cluster
from lives import flags
from programs import REPOSITORY, environment, run
from slurm_cluster import CPUS, NotHere, cluster

from sparsek_megatron.training.report import read_metrics

pytestmark = pytest.mark.slow

PROGRAM = "examples/pretrain_gpt.py"
STEPS = 160
LAYOUT = "--tensor-model-parallel-size 2 --sequence-parallel"
LONGEST_SECONDS = 300

# Ends well when it is told to stop; when it is started again there is nothing left to do.
STOPS = """
import pathlib, signal, sys, time
signals = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: signals.append(number))
started = pathlib.Path(sys.argv[1])
first = not started.exists()
started.touch()
deadline = time.monotonic() + 240
while first and not signals and time.monotonic() < deadline:
    time.sleep(0.1)
# They come again and again until it has ended, and Python restores their default action, to kill, on its way out.
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
print("told to stop" if signals else "not told to stop" if first else "nothing left", flush=True)
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    try:
        with cluster(tmp_path_factory.mktemp("slurm")) as settings:
            yield settings
    except NotHere as reason:
        pytest.skip(f"Slurm: {reason}")


@pytest.fixture(scope="module", autouse=True)
def time_limited(slurm, tmp_path_factory) -> tuple[str, Path]:
    """A job that runs into its time limit, beside the tests; Slurm's shortest limits are minutes."""
    folder = tmp_path_factory.mktemp("limited")
    options = ("--partition=high", "--cpus-per-task=1", "--time=2", "--signal=B:USR1@60")
    return submit(slurm, folder, *stops(folder), options=options, NPROC_PER_NODE="1"), folder


@pytest.fixture(scope="module")
def straight(prepared, tmp_path_factory) -> list[dict]:
    """Records of the uninterrupted run."""
    save = tmp_path_factory.mktemp("straight") / "run"
    run("pretrain_gpt.py", "--nproc-per-node", "2", *job_flags(prepared, save))
    return read_metrics(save)


def job_flags(prepared, save: Path) -> list[str]:
    return flags(prepared, save, steps=STEPS, save_interval=1000, layout=LAYOUT)


def stops(folder: Path) -> tuple[str, str]:
    """The program `STOPS` and its argument."""
    program = folder / "stops.py"
    program.write_text(STOPS)
    return str(program), str(folder / "started")


def submit(
    slurm: dict[str, str],
    folder: Path,
    program: str,
    *arguments: str,
    options: Sequence[str] = (),
    **variables: str,
) -> str:
    """Submit the job; its number."""
    path = f"{Path(sys.executable).parent}:{slurm['PATH']}"
    settings = slurm | environment() | {"PATH": path, "NPROC_PER_NODE": "2"} | variables
    command = [
        "sbatch",
        "--parsable",
        "--nodes=1",
        "--cpus-per-task=2",
        f"--output={folder}/job.out",
        *options,
    ]
    submitted = subprocess.run(
        [*command, "launch/slurm.sbatch", program, *arguments],
        env=settings, cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    return submitted.stdout.strip()


def preempt(slurm: dict[str, str]) -> None:
    """A short job that finds no room beside one of two cores in the partition `low`."""
    command = [
        "sbatch",
        "--partition=high",
        f"--cpus-per-task={CPUS - 1}",
        "--output=/dev/null",
        "--wrap=sleep 1",
    ]
    subprocess.run(command, env=slurm, check=True, capture_output=True)


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


def state(slurm: dict[str, str], job: str) -> dict[str, str]:
    """What Slurm says of a job."""
    said = subprocess.run(
        ["scontrol", "show", "job", "-o", job], env=slurm, capture_output=True, text=True, check=True
    )
    return dict(word.split("=", 1) for word in said.stdout.split() if "=" in word)


def test_before_the_time_limit_and_on_preemption_the_job_saves_goes_back_into_the_queue_and_finishes_bitwise(
    slurm, prepared, straight, tmp_path
):
    save, log = tmp_path / "run", tmp_path / "job.out"
    job = submit(slurm, tmp_path, PROGRAM, *job_flags(prepared, save))
    wait_until(lambda: taken(save) >= 5, "step 5", tmp_path)
    time_is_up(slurm, job)
    wait_until(lambda: "time limit; back into the queue" in log.read_text(), "requeue", tmp_path)
    stopped = int((save / "latest").read_text()[5:])
    assert 5 <= stopped < STEPS
    wait_until(lambda: taken(save) > stopped, f"step {stopped + 1}", tmp_path)
    preempt(slurm)
    wait_until(lambda: "stopped by preemption; back into the queue" in log.read_text(), "requeue", tmp_path)
    preempted = int((save / "latest").read_text()[5:])
    assert stopped < preempted < STEPS
    wait_until(lambda: not queued(slurm, job), "end of the job", tmp_path)
    said = log.read_text()
    assert f"stopped by SIGUSR1 after step {stopped}" in said and f"from step {stopped}" in said, said
    assert f"after step {preempted}" in said and f"from step {preempted}" in said, said
    assert "start 3:" in said and "start 4:" not in said
    assert read_metrics(save) == straight, said


def test_the_next_job_of_an_array_goes_on_where_the_last_one_stopped(slurm, prepared, straight, tmp_path):
    save = tmp_path / "run"
    job = submit(slurm, tmp_path, PROGRAM, *job_flags(prepared, save), options=["--array=1-2%1"])
    wait_until(lambda: taken(save) >= 5, "step 5", tmp_path)
    time_is_up(slurm, f"{job}_1")
    wait_until(lambda: not queued(slurm, job), "end of the array", tmp_path)
    said = (tmp_path / "job.out").read_text()
    assert "the array's next job goes on" in said and "resuming" in said, said
    assert read_metrics(save) == straight, said


def test_a_job_of_an_array_that_had_reached_its_end_when_it_was_preempted_is_requeued_once_and_alone(
    slurm, tmp_path
):
    job = submit(slurm, tmp_path, *stops(tmp_path), options=["--array=1-2%1"], NPROC_PER_NODE="1")
    wait_until((tmp_path / "started").exists, "start", tmp_path)
    preempt(slurm)
    wait_until(lambda: not queued(slurm, job), "end of the array", tmp_path)
    said = (tmp_path / "job.out").read_text()
    assert said.count("stopped by preemption; back into the queue") == 1, said
    assert said.count("\nnothing left\n") == 2, said
    for task, restarts in ((1, "1"), (2, "0")):
        known = state(slurm, f"{job}_{task}")
        assert known["JobState"] == "COMPLETED" and known["Restarts"] == restarts, known


def test_slurm_signals_the_job_ahead_of_a_real_time_limit(slurm, time_limited):
    job, folder = time_limited
    wait_until(lambda: not queued(slurm, job), "end of the job", folder)
    said, known = (folder / "job.out").read_text(), state(slurm, job)
    assert said.count("stopped before the time limit; back into the queue") == 1, said
    assert "\ntold to stop\n" in said, said
    assert "nothing left" in said and known["JobState"] == "COMPLETED" and known["Restarts"] == "1", said


def test_a_daemon_that_does_not_come_up_is_an_error(slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm_cluster, "CONFIGURATION", "NoSuchSetting=1\n")
    with pytest.raises(RuntimeError, match=r"did not come up here:(.|\n)*NoSuchSetting"), cluster(tmp_path):
        pass
