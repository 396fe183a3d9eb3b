# SPDX-License-Identifier: Apache-2.0
"""Ending a run between two steps when a signal asks for it: SIGTERM (preemption) and SIGUSR1 (time limit ahead)."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers the first of `SIGNALS` that this process received, and agrees about it with the other ranks.

    Within the `with` block the signals end nothing by themselves.
    """

    def __init__(self) -> None:
        self._received = 0
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self._received = self._received or number

    def agreed(self, device: torch.device) -> str | None:
        """Name of a signal that any rank has received, None if none has. A collective: the same on every rank."""
        flag = torch.tensor([self._received], dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        number = int(flag.item())
        return signal.Signals(number).name if number else None
