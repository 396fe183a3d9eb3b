# SPDX-License-Identifier: Apache-2.0
"""Runs side by side: where time is the budget, all runs take the same number of steps at the same learning rates.

Every CHUNK steps the runs wait for each other, and the last to arrive says how much of the time is spent. Learning
rates follow that progress, so that their decay ends with the time, whatever the speed of the machine. Logs keep the
progress at every chunk.
"""

from __future__ import annotations

import time
from multiprocessing.context import BaseContext
from typing import Any

CHUNK = 20


class Pace:
    """Progress of `runs` runs from 0 to 1 at `deadline` (time.time()).

    Made before the processes that share it. Each run calls `wait` after every chunk, and `leave` at its end. Time
    counts from the end of the first chunk, in which kernels are compiled.
    """

    def __init__(self, context: BaseContext, runs: int, deadline: float) -> None:
        self.deadline = deadline
        self.condition: Any = context.Condition()
        self.present: Any = context.Value("i", runs, lock=False)
        self.arrived: Any = context.Value("i", 0, lock=False)
        self.meetings: Any = context.Value("i", 0, lock=False)
        self.times: Any = context.Array("d", 3, lock=False)  # beginning; progress; progress a step

    def wait(self) -> tuple[float, float]:
        """Returns when all runs have come: (progress, progress a step in the last chunk)."""
        with self.condition:
            meeting = self.meetings.value
            self.arrived.value += 1
            self._meet()
            while self.meetings.value == meeting:
                self.condition.wait()
            return (self.times[1], self.times[2])

    def leave(self) -> None:
        """This run has finished or failed; the others go on."""
        with self.condition:
            self.present.value -= 1
            self._meet()

    def _meet(self) -> None:
        if not 0 < self.present.value == self.arrived.value:
            return
        now = time.time()
        if self.meetings.value == 0:
            self.times[0] = now
        began, before = self.times[0], self.times[1]
        self.times[1] = min(1.0, (now - began) / max(1e-9, self.deadline - began))
        self.times[2] = (self.times[1] - before) / CHUNK
        self.arrived.value = 0
        self.meetings.value += 1
        self.condition.notify_all()
