# SPDX-License-Identifier: Apache-2.0
"""launch/torchrun.sh over two nodes: two network namespaces with addresses of their own, joined by a cable.

Needs root, and runs where the ordinary suite does not: `pytest -m slow tests/faults/test_two_nodes.py`.
"""

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import REPOSITORY, environment, kill_all

from sparsek_megatron.training.report import read_metrics

pytestmark = pytest.mark.slow

NODES = tuple(f"sparsek-{os.getpid()}-{node}" for node in "ab")  # another run of this test has others
ADDRESSES = ("10.77.0.1", "10.77.0.2")
LONGEST_SECONDS = 240
NOT_PERMITTED = ("not permitted", "Permission denied", "Operation not supported", "Function not implemented")


def ip(*words: str) -> None:
    """Call ip; skips where the machine does not allow it, and fails with what it said for any other reason."""
    if shutil.which("ip") is None:
        pytest.skip("two nodes: the ip command (iproute2) is not installed")
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    said = f"ip {' '.join(words)}: {done.stderr.strip()}"
    if done.returncode and any(reason in said for reason in NOT_PERMITTED):
        pytest.skip(f"two nodes: network namespaces are not permitted here ({said})")
    if done.returncode:
        pytest.fail(said)


@pytest.fixture(scope="module")
def nodes():
    """Two network namespaces joined by a veth pair."""
    try:
        for node in NODES:
            ip("netns", "add", node)
        ip("link", "add", "cable0", "netns", NODES[0], "type", "veth", "peer", "name", "cable1", "netns", NODES[1])
        for number, (node, address) in enumerate(zip(NODES, ADDRESSES, strict=True)):
            ip("-n", node, "addr", "add", f"{address}/24", "dev", f"cable{number}")
            ip("-n", node, "link", "set", f"cable{number}", "up")
            ip("-n", node, "link", "set", "lo", "up")
        yield
    finally:
        if shutil.which("ip"):
            for node in NODES:
                subprocess.run(["ip", "netns", "del", node], check=False, capture_output=True)


def start_node(number: int, flags: list[str], log: Path, *, longest_file: int | None = None) -> subprocess.Popen:
    """launch/torchrun.sh on one node, as a site would start it there; with `longest_file` its disk is that small."""

    def small_disk() -> None:
        if longest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (longest_file, longest_file))

    settings = environment() | {
        "NNODES": "2", "NODE_RANK": str(number), "NPROC_PER_NODE": "2", "MASTER_ADDR": ADDRESSES[0],
        "NODE_ADDR": ADDRESSES[number], "NET_INTERFACE": f"cable{number}", "RDZV_ID": log.stem[:-1],
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    command = ["ip", "netns", "exec", NODES[number], str(REPOSITORY / "launch" / "torchrun.sh")]
    with open(log, "a") as stream:
        return subprocess.Popen(
            [*command, "examples/pretrain_gpt.py", *flags], env=settings, stdout=stream, stderr=subprocess.STDOUT,
            preexec_fn=small_disk,
        )  # fmt: skip


def run_job(
    flags: list[str], save: Path, folder: Path, *,
    kill_at_step: int | None = None, longest_file: int | None = None, code: int = 0,
) -> str:  # fmt: skip
    """Both nodes to their end, which must be `code` on each; what they printed.

    After `kill_at_step` the second one is killed and started again; `longest_file` is of its disk.
    """
    logs = [folder / f"{save.name}{number}.log" for number in (0, 1)]
    limits = (None, longest_file)
    running = [start_node(number, flags, logs[number], longest_file=limits[number]) for number in (0, 1)]
    deadline = time.monotonic() + LONGEST_SECONDS
    try:
        if kill_at_step is not None:
            while not any(record["step"] >= kill_at_step for record in read_metrics(save)):
                assert time.monotonic() < deadline and running[0].poll() is None, logs[0].read_text()
                time.sleep(0.01)
            kill_all(running[1])
            running[1] = start_node(1, flags, logs[1])
        for process in running:
            process.wait(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pytest.fail("the job did not end:\n" + "\n".join(log.read_text()[-4000:] for log in logs))
    finally:
        for process in running:
            if process.poll() is None:
                kill_all(process)
    said = "\n".join(log.read_text() for log in logs)
    assert [process.returncode for process in running] == [code, code], said
    return said


def job_flags(prepared, save: Path) -> list[str]:
    layout = "--tensor-model-parallel-size 2 --sequence-parallel --zero-stage 1 --global-batch-size 4"
    steps = "--train-iters 24 --save-interval 2 --eval-interval 12"
    return [*prepared.flags(save), "--load", str(save), *layout.split(), *steps.split()]


@pytest.fixture(scope="module")
def straight(nodes, prepared, tmp_path_factory) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight")
    run_job(job_flags(prepared, folder / "straight"), folder / "straight", folder)
    return folder / "straight"


def test_a_node_that_is_killed_and_started_again_rejoins_and_the_run_goes_on_bitwise(
    straight, prepared, tmp_path
):
    killed = tmp_path / "killed"
    said = run_job(job_flags(prepared, killed), killed, tmp_path, kill_at_step=8)
    assert "resuming" in said
    assert read_metrics(killed) == read_metrics(straight)


def test_a_full_disk_of_one_node_ends_the_launch_on_both_with_one_line_and_no_restart(straight, prepared, tmp_path):
    save = tmp_path / "full"
    longest = max(file.stat().st_size for file in straight.glob("step_00000024/*"))
    said = run_job(job_flags(prepared, save), save, tmp_path, longest_file=longest // 2, code=2)
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "checkpoint of step 2 not written" in errors[0], said
    assert "launch/torchrun.sh:" not in said and "Traceback" not in said, said


def test_what_is_not_a_missing_permission_fails(nodes):
    with pytest.raises(pytest.fail.Exception, match="File exists"):
        ip("netns", "add", NODES[0])
