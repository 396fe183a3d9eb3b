# SPDX-License-Identifier: Apache-2.0
"""Data workers and the signals that stop a run: they outlive those of others, and end with their parent.

By itself torch lets a SIGTERM that is not its parent's kill a worker, and the run with it, before its checkpoint.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
import time


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


PATIENCE = 5.0
"""Seconds after which a worker that does not end by SIGTERM, stuck in a library's call, is killed."""


@atexit.register
def _end_workers() -> None:
    """End the workers whose iterator is still there at exit, as after an exception.

    multiprocessing would send each SIGTERM once, and wait for its end without a limit. But that signal is lost while
    one that somebody else sent is still pending: it is sent here until it has worked.
    """
    deadline = time.monotonic() + PATIENCE
    while workers := [child for child in multiprocessing.active_children() if child.daemon]:
        for worker in workers:
            if time.monotonic() < deadline:
                worker.terminate()
            else:
                worker.kill()
            worker.join(0.1)
