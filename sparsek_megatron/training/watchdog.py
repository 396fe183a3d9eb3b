# SPDX-License-Identifier: Apache-2.0
"""Ends a process that makes no progress, so that its launcher can restart the run."""

import faulthandler
import os
import sys
import threading
import time

EXIT_HANG = 75  # EX_TEMPFAIL: trying again may help
_watching: "Watchdog | None" = None  # the one of this process


def progress() -> None:
    """What this process's watchdog was last told of goes on; nothing where none watches.

    For loops that end: micro-batches, batches of a validation, a wait for files that grow. From the thread that trains
    alone: another one's progress would hide that training hangs.
    """
    if _watching:
        _watching.goes_on()


class Watchdog:
    """Watches the time since the last `beat`; past `timeout_seconds` it prints every thread's stack and exits.

    It exits with `EXIT_HANG` at once and runs no cleanup, which could hang too. 0 seconds watches nothing. The watching
    thread needs the interpreter lock only between waits, and collectives release it: a rank stuck in one is seen.
    """

    def __init__(self, timeout_seconds: float, rank: int):
        self._timeout = timeout_seconds
        self._rank = rank
        self._what = "start"
        self._last = time.monotonic()
        self._ended = threading.Event()
        global _watching
        _watching = self
        if timeout_seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, what: str) -> None:
        """There was progress; `what` comes next."""
        self._what = what
        self.goes_on()

    def goes_on(self) -> None:
        """There was progress, and there is more to do of the same."""
        self._last = time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        global _watching
        _watching = None
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(self._timeout / 20):
            quiet = time.monotonic() - self._last
            if quiet > self._timeout:
                print(
                    f"rank {self._rank}: no progress for {quiet:.0f} s in {self._what}; ending this process with exit "
                    f"code {EXIT_HANG} (--hang-timeout-seconds {self._timeout:g}). Its stacks:",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                faulthandler.dump_traceback(file=sys.stderr)
                os._exit(EXIT_HANG)
