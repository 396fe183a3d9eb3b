# SPDX-License-Identifier: Apache-2.0
"""The signals that ask a run to end between two steps: SIGTERM (preemption) and SIGUSR1 (time limit ahead).

Whoever asks may ask again until the process is gone: from `hold_signals` on, these signals end nothing by themselves.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def hold_signals() -> None:
    """Let `SIGNALS` wait until `release_signals`. Call it before the imports: they take seconds, and start threads
    that would take the signals in place of this one.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def release_signals() -> None:
    """Let `SIGNALS` through, those that wait first."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """A context in which `SIGNALS` wait. A process that is started in it keeps them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
