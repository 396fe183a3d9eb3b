# SPDX-License-Identifier: Apache-2.0
"""Ranks as forks of one process: PyTorch, megatron-core and DeepSpeed are imported once, not once on every rank.

For CPU alone: a process that has asked for CUDA cannot be forked.
"""

import gc
import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import wait


def run_ranks(function: Callable[[], None], ranks: int) -> None:
    """Call `function` in `ranks` new processes that find in their environment what torchrun would put there.

    Raises:
        RuntimeError: a rank failed; the others have been killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    gc.freeze()  # megatron-core collects garbage at every checkpoint: then only what a rank made
    context = multiprocessing.get_context("fork")
    running = {}
    for rank in range(ranks):
        process = context.Process(target=_be_rank, args=(function, rank, ranks, port))
        process.start()
        running[process.sentinel] = process
    while running:
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                for other in running.values():
                    other.kill()
                    other.join()
                raise RuntimeError(f"{process.name} of {ranks} ranks ended with {process.exitcode}")


def _be_rank(function: Callable[[], None], rank: int, ranks: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    function()
