# SPDX-License-Identifier: Apache-2.0
"""launch/torchrun.sh over two nodes: two network namespaces with addresses of their own, joined by a cable.

Needs root, and runs where the ordinary suite does not: `pytest -m slow tests/faults/test_two_nodes.py`.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import REPOSITORY, environment, kill_all

from sparsek_megatron.training.report import read_metrics

pytestmark = pytest.mark.slow

NODES = ("sparsek-a", "sparsek-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
LONGEST_SECONDS = 240


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def nodes():
    """Two network namespaces joined by a veth pair; skips, saying why, where they cannot be made."""
    if shutil.which("ip") is None:
        pytest.skip("two nodes: the ip command (iproute2) is not installed")
    try:
        ip("netns", "add", NODES[0])
    except subprocess.CalledProcessError as err:
        pytest.skip(f"two nodes: network namespaces are not permitted here ({err.stderr.strip()})")
    try:
        ip("netns", "add", NODES[1])
        ip("link", "add", "cable0", "netns", NODES[0], "type", "veth", "peer", "name", "cable1", "netns", NODES[1])
        for number, (node, address) in enumerate(zip(NODES, ADDRESSES, strict=True)):
            ip("-n", node, "addr", "add", f"{address}/24", "dev", f"cable{number}")
            ip("-n", node, "link", "set", f"cable{number}", "up")
            ip("-n", node, "link", "set", "lo", "up")
        yield
    finally:
        for node in NODES:
            subprocess.run(["ip", "netns", "del", node], check=False, capture_output=True)


def start_node(number: int, flags: list[str], log: Path) -> subprocess.Popen:
    """launch/torchrun.sh on one node, as a site would start it there."""
    settings = environment() | {
        "NNODES": "2", "NODE_RANK": str(number), "NPROC_PER_NODE": "2", "MASTER_ADDR": ADDRESSES[0],
        "NODE_ADDR": ADDRESSES[number], "NET_INTERFACE": f"cable{number}", "RDZV_ID": log.stem[:-1],
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    command = ["ip", "netns", "exec", NODES[number], str(REPOSITORY / "launch" / "torchrun.sh")]
    with open(log, "a") as stream:
        return subprocess.Popen(
            [*command, "examples/pretrain_gpt.py", *flags], env=settings, stdout=stream, stderr=subprocess.STDOUT
        )


def run_job(flags: list[str], save: Path, folder: Path, *, kill_at_step: int | None = None) -> str:
    """Both nodes to their end, the second one killed and started again after `kill_at_step`; what they printed."""
    logs = [folder / f"{save.name}{number}.log" for number in (0, 1)]
    running = [start_node(number, flags, logs[number]) for number in (0, 1)]
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
    assert [process.returncode for process in running] == [0, 0], said
    return said


def test_a_node_that_is_killed_and_started_again_rejoins_and_the_run_goes_on_bitwise(nodes, prepared, tmp_path):
    def flags(save: Path) -> list[str]:
        layout = "--tensor-model-parallel-size 2 --sequence-parallel --zero-stage 1 --global-batch-size 4"
        steps = "--train-iters 40 --save-interval 2 --eval-interval 20"
        return [*prepared.flags(save), "--load", str(save), *layout.split(), *steps.split()]

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_job(flags(straight), straight, tmp_path)
    said = run_job(flags(killed), killed, tmp_path, kill_at_step=8)
    assert "resuming" in said
    assert read_metrics(killed) == read_metrics(straight)
