# SPDX-License-Identifier: Apache-2.0
"""What several ranks do together: agree on a row, and end when one of them cannot go on."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist
from training_benchmark.row import Row

from sparsek_megatron.errors import EXIT_USAGE
from sparsek_megatron.training.parallel import Machine

_FAILED, _TOLD = "benchmark_failed", "benchmark_failure_told"
_PATIENCE = datetime.timedelta(seconds=60)


def agree(row: Row, machine: Machine) -> Row:
    """The first rank's row, the same on every rank, with the peak memory of the rank that held most and the mean loss:
    under context parallelism each rank's is of its own tokens.
    """
    if machine.world_size == 1:
        return row
    assert row.loss is not None
    found: list[tuple[float, float | None]] = [(row.loss, row.peak_gib)] * machine.world_size
    dist.all_gather_object(found, (row.loss, row.peak_gib))
    shared = [row]
    dist.broadcast_object_list(shared, src=0)
    losses, peaks = zip(*found, strict=True)
    shared[0].loss = sum(losses) / len(losses)
    shared[0].peak_gib = max((peak for peak in peaks if peak is not None), default=None)
    return shared[0]


def wait_for_all(machine: Machine) -> None:
    """Return once every rank is here."""
    if machine.world_size > 1:
        dist.barrier()


def end_launch(machine: Machine, tell: Callable[[], None]) -> NoReturn:
    """End this process and, through the launcher, all others; the first rank that comes here calls `tell` before.

    The others may wait in a collective for this rank and cannot be asked. torchrun ends them once one has failed.
    """
    if machine.store.add(_FAILED, 1) == 1:
        tell()
        machine.store.set(_TOLD, "1")
    else:
        machine.store.wait([_TOLD], _PATIENCE)
    _leave()


def leave_if_ended(machine: Machine) -> None:
    """Where another rank has ended the launch, end quietly: the error met here is the broken connection to it."""
    if machine.world_size > 1 and machine.store.check([_TOLD]):
        _leave()


def _leave() -> NoReturn:
    """Not through the interpreter's end: it would wait for kernels that wait for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_USAGE)
