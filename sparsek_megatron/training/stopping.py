# SPDX-License-Identifier: Apache-2.0
"""Ending a run between two steps when a signal asks for it: SIGTERM (preemption) and SIGUSR1 (time limit ahead).

Whoever asks may ask again until the process is gone: from `hold_signals` on, these signals end nothing by themselves.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from sparsek_megatron.training.reading import Reading

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def hold_signals() -> None:
    """Let `SIGNALS` wait until `release_signals`. Call it before the imports: they take seconds, and start threads
    that would take the signals in place of this one.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def release_signals() -> None:
    """Let `SIGNALS` through, those that wait first."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class StopRequest:
    """Remembers the first of `SIGNALS` that this process received, and agrees about it with the other ranks.

    The `with` block begins with those that were held. After it the signals are ignored: the run is over.
    """

    def __init__(self) -> None:
        self._received = 0

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            signal.signal(number, self._remember)
        release_signals()
        return self

    def __exit__(self, *_: object) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self._received = self._received or number

    def ask(self, device: torch.device) -> Reading:
        """Number of a signal that any rank has received by now, 0 if none has. A collective: the same on every rank."""
        import torch
        import torch.distributed as dist

        from sparsek_megatron.training.reading import Reading

        # From pinned memory: the host does not wait until the device has taken it.
        flag = torch.tensor([self._received], dtype=torch.int32, pin_memory=device.type == "cuda")
        flag = flag.to(device, non_blocking=True)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return Reading(flag)


def name_of(answer: Reading) -> str | None:
    """Name of the signal that `StopRequest.ask` found, None if none."""
    number = int(answer.item())
    return signal.Signals(number).name if number else None
