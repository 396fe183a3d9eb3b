# SPDX-License-Identifier: Apache-2.0
"""Ends a distributed run when one of its processes has died, with its rank in the message.

The others are inside a collective that never ends and would learn of it from a timeout, minutes later, and not which
rank it was. A thread of every process leaves a sign of life in the store that the processes met at, and watches one
other rank's: traffic that grows with the ranks, not with their square.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

EXIT_RANK_DIED = 75  # EX_TEMPFAIL: trying again may help
_DEAD, _DONE = "dead", b"done"
_STARTING = b"starting"


class Liveness:
    """A context in which this process shows that it lives and ends where another one died.

    store            met by all ranks, with keys of this run alone (a `PrefixStore`)
    timeout_seconds  without a sign of life for this long a rank counts as dead. A stopped process does too; one that
                     hangs in a collective does not
    start_timeout_seconds  in its place for a rank that has not called `started` yet; None for no difference

    Leaves with `EXIT_RANK_DIED` at once and without cleanup, which could hang as well.
    """

    def __init__(
        self,
        store: dist.Store,  # pyright: ignore[reportPrivateImportUsage]
        rank: int,
        world_size: int,
        *,
        timeout_seconds: float = 60.0,
        start_timeout_seconds: float | None = None,
    ) -> None:
        own: Any = dist.PrefixStore("liveness", store)  # pyright: ignore[reportPrivateImportUsage]
        self._store = own.clone()  # a connection of its own: others may block
        self._rank, self._watched = rank, (rank + 1) % world_size
        self._timeout = timeout_seconds
        self._start_timeout = timeout_seconds if start_timeout_seconds is None else start_timeout_seconds
        self._phase = _STARTING.decode()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)
        self._alone = world_size == 1

    def __enter__(self) -> Liveness:
        if not self._alone:
            self._store.set(f"{self._rank}", f"{self._phase} 0")
            self._thread.start()
        return self

    def started(self) -> None:
        """What may hold up this process's threads for long is behind it: from now on the short limit holds."""
        self._phase = "running"

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._ended.set()
        if not self._alone:
            self._thread.join()
            with contextlib.suppress(
                dist.DistError, RuntimeError
            ):  # the store may be gone before its last user
                self._store.set(f"{self._rank}", _DONE.decode())

    def _watch(self) -> None:
        seen, changed, beat = _STARTING, time.monotonic(), 0
        while not self._ended.wait(self._timeout / 10):
            beat += 1
            try:
                self._store.set(f"{self._rank}", f"{self._phase} {beat}")
                sign = self._store.get(f"{self._watched}") if self._store.check([f"{self._watched}"]) else _STARTING
                dead = self._store.get(_DEAD).decode() if self._store.check([_DEAD]) else None
            except (dist.DistError, RuntimeError) as error:
                if self._ended.is_set():
                    return
                self._leave(f"the store that the ranks met at is gone ({str(error).splitlines()[0]})")
            if sign != seen or sign == _DONE:
                seen, changed = sign, time.monotonic()
            limit = self._start_timeout if sign.startswith(_STARTING) else self._timeout
            if dead is None and time.monotonic() - changed > limit:
                reason = f"rank {self._watched} has shown no sign of life for {limit:g} s"
                dead = self._store.compare_set(_DEAD, "", reason).decode()
            if dead is not None:
                self._leave(dead)

    def _leave(self, reason: str) -> NoReturn:
        print(
            f"rank {self._rank}: {reason}; ending this process with exit code {EXIT_RANK_DIED}",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(EXIT_RANK_DIED)
