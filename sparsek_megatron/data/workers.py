# SPDX-License-Identifier: Apache-2.0
"""Data workers and the signals that stop a run: they outlive those of others, and end with their parent.

By itself torch lets a SIGTERM that is not its parent's kill a worker, and the run with it, before its checkpoint.
"""

from __future__ import annotations

import atexit
import multiprocessing.util  # noqa: F401  # its handler at exit is registered before, and so runs after, those below
import os
import signal
import threading
import weakref
from typing import Any


def ignore_sigterm_except_from_parent(_worker: int) -> None:
    """In a process that was started in `signals_held`, let SIGTERM end it only if its parent sends it, or is gone.

    Slurm, `timeout` and torchrun's agent send it to every process of a run, whose last step still needs its data
    workers. A thread waits for it, because a handler in Python is not told who has sent it.
    """
    parent = os.getppid()

    def wait() -> None:
        sender = 0
        while sender != parent and os.getppid() == parent:
            sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        os._exit(0)  # any other code is an error of a worker to torch, which would report it

    threading.Thread(target=wait, name="sigterm", daemon=True).start()


def kill_at_exit(batches: Any) -> None:
    """Let the workers of `batches`, a `DataLoader`'s iterator, end with this process if it still has them then.

    torch and multiprocessing would send each a SIGTERM once, and wait for its end without a limit. That signal is lost
    while one that somebody else sent is pending, and without effect on a worker that is stuck in a library's call.
    """
    atexit.register(_kill, weakref.ref(batches), os.getpid())


def _kill(reference: weakref.ref[Any], owner: int) -> None:
    workers = getattr(reference(), "_workers", [])
    if workers and os.getpid() == owner:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises where a worker was killed
        for worker in workers:
            worker.kill()
