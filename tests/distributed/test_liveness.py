# SPDX-License-Identifier: Apache-2.0
"""A rank that dies is named by the others, which stop within the timeout; ranks that end at different times are not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import torch.distributed as dist

from sparsek_megatron import liveness
from sparsek_megatron.liveness import EXIT_RANK_DIED

# The module alone: importing the package would take the ranks several seconds more.
PROGRAM = """
import runpy, sys, time
import torch.distributed as dist
Liveness = runpy.run_path(sys.argv[1])["Liveness"]
port, rank, ranks, timeout, seconds = (float(x) for x in sys.argv[2:])
store = dist.TCPStore("127.0.0.1", int(port), is_master=False)
with Liveness(dist.PrefixStore("run", store), int(rank), int(ranks), timeout_seconds=timeout):
    print("ready", flush=True)
    time.sleep(seconds)
"""


def start(store: dist.TCPStore, lifetimes: list[float], timeout: float) -> list[subprocess.Popen[str]]:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROGRAM]
            + [str(x) for x in (liveness.__file__, store.port, rank, len(lifetimes), timeout, seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, seconds in enumerate(lifetimes)
    ]
    for process in ranks:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return ranks


def test_the_others_name_a_rank_that_died_and_stop() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = start(store, [600, 600, 600], timeout=4)
    ranks[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    for number in (0, 2):
        _, said = ranks[number].communicate(timeout=60)
        assert ranks[number].returncode == EXIT_RANK_DIED
        assert f"rank {number}: rank 1 has shown no sign of life for 4 s" in said
    assert time.monotonic() - began < 15
    ranks[1].communicate()


def test_ranks_may_end_at_different_times() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = start(store, [0.1, 6, 0.1], timeout=2)
    for process in ranks:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
