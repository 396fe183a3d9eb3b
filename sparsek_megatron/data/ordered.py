# SPDX-License-Identifier: Apache-2.0
"""A function over chunks of items on several processes, results in order; a process that is killed is noticed.

`multiprocessing.Pool` waits for ever for what a killed process had taken, and so does `ProcessPoolExecutor` where the
process was writing into the queue that all share. Here each process has a connection of its own, and its end is the
end of that connection; a process whose parent is gone ends in the same way.
"""

import contextlib
import itertools
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")
_CHUNK = 16
_AHEAD = 4  # chunks for each process, taken beyond those whose results have been given: what bounds the memory


class WorkerKilled(Exception):
    """A process was ended by a signal, most often by the kernel's out-of-memory killer."""


def ordered_map(start: Callable[[], Callable[[_T], _R]], items: Iterable[_T], *, processes: int) -> Iterator[_R]:
    """`start()(item)` of each item, in the order of the items; `start` is called once in each process.

    Raises:
        WorkerKilled: a signal ended a process. The others are ended too, as with any exception.
    """
    # Fork: a spawned process would import torch and megatron again, for longer than small corpora take.
    context = multiprocessing.get_context("fork")
    workers: dict[Connection, Any] = {}
    try:
        for _ in range(processes):
            here, there = context.Pipe()
            worker = context.Process(target=_serve, args=(there, here, start), daemon=True)
            worker.start()
            there.close()  # else a process forked later would keep it open
            workers[here] = worker
        yield from _results(workers, items)
    finally:
        for connection, worker in workers.items():
            worker.kill()
            worker.join()
            connection.close()


def _results(workers: dict[Connection, Any], items: Iterable[Any]) -> Iterator[Any]:
    stream = iter(items)
    idle = list(workers)
    busy: dict[Connection, int] = {}  # the number of the chunk that is there
    early: dict[int, list[Any]] = {}  # results that wait for their turn
    taken = due = 0
    while True:
        while idle and taken < due + _AHEAD * len(workers):
            chunk = list(itertools.islice(stream, _CHUNK))
            if not chunk:
                break
            connection = idle.pop()
            with _noticing_the_end(workers[connection]):
                connection.send(chunk)
            busy[connection] = taken
            taken += 1
        if due in early:
            yield from early.pop(due)
            due += 1
        elif not busy:
            return
        ready = wait(list(busy), 0 if due in early or not busy else None)
        for connection in [each for each in busy if each in ready]:
            with _noticing_the_end(workers[connection]):
                early[busy.pop(connection)] = connection.recv()
            idle.append(connection)


@contextlib.contextmanager
def _noticing_the_end(worker: Any) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):
        worker.join()
        if worker.exitcode < 0:
            raise WorkerKilled(f"by signal {-worker.exitcode}") from None
        raise RuntimeError("a worker process failed; its own traceback is above") from None


def _serve(connection: Connection, other_end: Connection, start: Callable[[], Callable[[Any], Any]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    other_end.close()
    function = start()
    while True:
        try:
            chunk = connection.recv()
        except (EOFError, OSError):  # the parent is gone
            return
        results = [function(item) for item in chunk]
        try:
            connection.send(results)
        except OSError:
            return
