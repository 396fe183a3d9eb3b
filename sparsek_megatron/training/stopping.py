# SPDX-License-Identifier: Apache-2.0
"""Ending a run between two steps when a signal asks for it."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING

from sparsek_megatron.stop_signals import SIGNALS, release_signals

if TYPE_CHECKING:
    import torch

    from sparsek_megatron.training.reading import Reading


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
