# SPDX-License-Identifier: Apache-2.0
"""A rank that dies is named by the others, which stop within the timeout; ranks that end at different times are not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from sparsek_megatron import liveness
from sparsek_megatron.liveness import EXIT_RANK_DIED

# The module alone: importing the package would take the ranks several seconds more.
PROGRAM = """
import runpy, sys, time
import torch.distributed as dist
Liveness = runpy.run_path(sys.argv[1])["Liveness"]
port, rank, ranks, timeout, seconds = (float(x) for x in sys.argv[2:7])
start = {"start_timeout_seconds": float(sys.argv[7])} if sys.argv[7:] else {}
store = dist.TCPStore("127.0.0.1", int(port), is_master=False)
with Liveness(dist.PrefixStore("run", store), int(rank), int(ranks), timeout_seconds=timeout, **start) as own:
    if sys.argv[8:]:
        own.started()
    print("ready", flush=True)
    time.sleep(seconds)
"""


def start(store: dist.TCPStore, lifetimes: list[float], timeout: float, *more: object) -> list[subprocess.Popen[str]]:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROGRAM]
            + [str(x) for x in (liveness.__file__, store.port, rank, len(lifetimes), timeout, seconds, *more)],
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


def test_a_rank_may_be_silent_for_long_while_it_starts() -> None:
    """As one whose library holds the interpreter lock is."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = start(store, [7, 7], 2, 600)
    ranks[1].send_signal(signal.SIGSTOP)
    time.sleep(4)
    ranks[1].send_signal(signal.SIGCONT)
    for process in ranks:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said


@pytest.mark.parametrize(("limits", "seconds"), [((2, 5), 5), ((2, 600, "started"), 2)])
def test_a_rank_that_dies_is_named_while_it_starts_and_sooner_later(limits: tuple[object, ...], seconds: int) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = start(store, [600, 600], *limits)
    time.sleep(1)
    ranks[1].send_signal(signal.SIGKILL)
    _, said = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == EXIT_RANK_DIED
    assert f"rank 0: rank 1 has shown no sign of life for {seconds} s" in said
    ranks[1].communicate()
