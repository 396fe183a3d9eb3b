# SPDX-License-Identifier: Apache-2.0
"""Writing a checkpoint in the background, so that it is complete or absent whatever happens.

Every rank writes its files into one hidden folder, flushes them and, unless told not to, reads them back, each in a
process of its own (`write_file`). When all have said so through the store, the first rank adds the manifest, renames
the folder and moves `latest`: in that order, each flushed before the next. A kill at any instant leaves the previous
checkpoint in force. Nothing here runs a collective, so training goes on meanwhile.
"""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sparsek_megatron.errors import UserError, describe_os_error
from sparsek_megatron.files import atomic_write, fsync_path, publish
from sparsek_megatron.training import write_file
from sparsek_megatron.training.manifest import FileRecord, record_of, write_manifest
from sparsek_megatron.training.parallel import Machine
from sparsek_megatron.training.run_folder import ASIDE, LATEST, checkpoint_name, newest_complete, saved_steps
from sparsek_megatron.training.watchdog import progress

PARTIAL = ".partial-"
_REPLACED = ".replaced-"
_DONE = "done"
_PIPE = 1 << 20  # bytes; what a pipe holds at most
_LOOK = 0.25  # seconds between two looks at how far the files are
_numbers = itertools.count()


class CheckpointWriter:
    """Writes one checkpoint at a time for this rank; every rank of the run has one and calls it at the same steps."""

    def __init__(
        self, root: Path, machine: Machine, *, keep_last_n: int, read_back: bool, timeout_seconds: float
    ) -> None:
        self._root = root
        self._machine = machine
        self._keep = keep_last_n
        self._read_back = read_back
        self._timeout = timeout_seconds
        self._thread: threading.Thread | None = None
        self._step = 0
        self._prefix = ""  # of its keys in the store
        self._paths: list[Path] = []  # of this rank's files
        self._outcome = _DONE
        self._news: list[str] = []

    def folder(self, step: int) -> Path:
        """The hidden folder that the files of `step` are written to."""
        return self._root / (PARTIAL + checkpoint_name(step))

    def clear(self) -> None:
        """Remove what earlier attempts left half-written. For the first rank, before a checkpoint begins."""
        for pattern in (PARTIAL, _REPLACED):
            for stale in self._root.glob(pattern + "*"):
                shutil.rmtree(stale, ignore_errors=True)

    def begin(self, step: int, files: dict[str, Any], *, ready: Callable[[], None]) -> None:
        """Start writing this rank's `files` (name to what `torch.save` takes) of the checkpoint of `step`.

        `ready` is called by the writing thread first: it returns when their tensors may be read.
        """
        assert self._thread is None, "the previous checkpoint has not been waited for"
        self._step = step
        self._prefix = f"checkpoint_{next(_numbers)}"
        self._paths = [self.folder(step) / name for name in files]
        self._thread = threading.Thread(
            target=self._run, args=(self._prefix, step, files, ready), name="checkpoint-writer", daemon=True
        )
        self._thread.start()

    def finish(self) -> None:
        """Wait until the checkpoint under way, if any, is in force on disk. While any rank's files get on, all ranks'
        watchdogs hear of it: a rank that has written its own waits for the others', for the writer's timeout at most.

        Raises:
            UserError: it could not be written (a full disk, say); the same on every rank.
        """
        if self._thread is None:
            return
        far, heard = None, None
        while self._thread.is_alive():
            before, far = far, self._how_far(self._thread)
            with contextlib.suppress(RuntimeError):  # a store that is gone: the writing thread says so
                count = self._machine.store.add(f"{self._prefix}/progress", int(far != before))
                if count != heard:
                    progress()
                heard = count
            self._thread.join(_LOOK)
        self._thread = None
        if self._outcome != _DONE:
            good, _ = newest_complete(self._root)
            kept = "there is no earlier checkpoint" if good is None else f"the checkpoint of step {good} is intact"
            raise UserError(
                f"--save {self._root}: checkpoint of step {self._step} not written: {self._outcome} ({kept})"
            )

    def _how_far(self, thread: threading.Thread) -> tuple[list[int], list[str]]:
        """What changes while this rank's files get on: their sizes, and what the kernel counts of the bytes that the
        writing thread's process has read and written, which grows as it reads back.
        """
        sizes: list[int] = []
        counts: list[str] = []
        for path in self._paths:
            with contextlib.suppress(OSError):
                sizes.append(path.stat().st_size)
        with contextlib.suppress(OSError):  # a process that has just ended, or a kernel that does not count
            children = Path(f"/proc/self/task/{thread.native_id}/children").read_text().split()
            counts = [Path(f"/proc/{child}/io").read_text() for child in children]
        return sizes, counts

    def news(self) -> list[str]:
        """Lines about what has been written since the last call."""
        lines, self._news = self._news, []
        return lines

    def _run(self, prefix: str, step: int, files: dict[str, Any], ready: Callable[[], None]) -> None:
        begun = time.perf_counter()
        # The main thread handles signals. The processes started here inherit this: what ends a run must not end them.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            ready()
            folder = self.folder(step)
            records = {
                name: _write(folder / name, state, read_back=self._read_back) for name, state in files.items()
            }
            told = {"files": {name: asdict(record) for name, record in records.items()}}
        except Exception as err:
            told = {"error": _reason(err)}
        try:
            self._outcome = self._agree(prefix, step, told)
        except Exception as err:
            self._outcome = _reason(err)
        if self._outcome == _DONE:
            seconds = time.perf_counter() - begun
            self._news.append(f"step {step}: saved {self._root / checkpoint_name(step)} (written in {seconds:.1f} s)")

    def _agree(self, prefix: str, step: int, told: dict[str, Any]) -> str:
        """Tell the first rank how it went here; the outcome for the whole checkpoint."""
        store, rank = self._machine.store, self._machine.rank
        store.set(f"{prefix}/{rank}", json.dumps(told))
        if rank == 0:
            store.set(f"{prefix}/outcome", self._publish(prefix, step))
        return self._get(f"{prefix}/outcome").decode()

    def _get(self, key: str) -> bytes:
        """A key's value once it is there. Asks and sleeps: a blocking wait would hold up the store's other users."""
        deadline = time.monotonic() + self._timeout
        pause = 0.001
        while not self._machine.store.check([key]):
            if time.monotonic() > deadline:
                raise UserError(f"no word from the other processes within {self._timeout:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
        return self._machine.store.get(key)

    def _publish(self, prefix: str, step: int) -> str:
        folder, final = self.folder(step), self._root / checkpoint_name(step)
        try:
            # Of all ranks before one failure ends it: the folder is removed then, and none may still be writing there.
            answers = [json.loads(self._get(f"{prefix}/{rank}")) for rank in range(self._machine.world_size)]
            records: dict[str, FileRecord] = {}
            for told in answers:
                if "error" in told:
                    raise UserError(told["error"])
                records |= {name: FileRecord(**record) for name, record in told["files"].items()}
            absent = [name for name in records if not (folder / name).is_file()]
            if absent:
                raise UserError(f"{absent[0]} is not there: --save must be on a file system that all nodes share")
            for path in folder.iterdir():  # what DeepSpeed adds of its own accord
                if path.name not in records:
                    fsync_path(path)
                    records[path.name] = record_of(path)
            write_manifest(folder, records)
            fsync_path(folder)
            self._put_aside(step)
            if final.exists():  # of a trajectory that was given up, or damaged
                os.replace(final, final.with_name(_REPLACED + final.name))
            publish(folder, final)
            with atomic_write(self._root / LATEST) as stream:
                stream.write(final.name)
            self._prune(step)
        except Exception as err:
            shutil.rmtree(folder, ignore_errors=True)
            return _reason(err)
        return _DONE

    def _put_aside(self, step: int) -> None:
        """Rename the checkpoints of later steps: this run has not come by them, so they must not be tried in the place
        of its own, should `latest` be lost.
        """
        for path in (self._root / checkpoint_name(later) for later in saved_steps(self._root) if later > step):
            aside = path.with_name(ASIDE + path.name)
            if aside.exists():
                os.replace(aside, path.with_name(_REPLACED + path.name))
            os.replace(path, aside)
            self._news.append(f"{path}: of a trajectory that was given up; it is {aside} now, remove it at will")

    def _prune(self, step: int) -> None:
        """Remove all but the `keep_last_n` newest up to `step`, the one just written among them."""
        for replaced in self._root.glob(_REPLACED + "*"):
            shutil.rmtree(replaced, ignore_errors=True)
        if self._keep:
            earlier = [each for each in saved_steps(self._root) if each < step]
            for old in earlier[: max(0, len(earlier) - (self._keep - 1))]:
                shutil.rmtree(self._root / checkpoint_name(old), ignore_errors=True)


def _write(path: Path, state: Any, *, read_back: bool) -> FileRecord:
    """Write one file, flush it, read it back if asked: `torch.save` into the process that does the rest.

    Raises:
        OSError: it cannot be written, or what is on the disk is not what was written.
    """
    command = [sys.executable, "-I", "-S", write_file.__file__, str(path), str(os.getpid())]
    command += ["--read-back"] if read_back else []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        failure = None
        try:
            with process.stdin as pipe:
                with contextlib.suppress(OSError):  # past the user's share of pages: a small pipe is slower
                    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE)
                torch.save(state, pipe)
        except Exception as err:  # a pipe that broke, mostly: the process says why
            failure = err
        said = process.stdout.read()
    answer = json.loads(said) if said else None
    if isinstance(answer, dict):
        if answer["errno"] is None:
            raise OSError(answer["error"])
        raise OSError(answer["errno"], answer["error"], str(path))
    if answer is None:
        raise OSError(f"the process that writes {path.name} ended with code {process.returncode}") from failure
    if failure is not None:
        raise failure
    return FileRecord(*answer)


def _reason(err: BaseException) -> str:
    """What went wrong, in one line; torch.save wraps the file system's error in a RuntimeError of its own."""
    seen: BaseException | None = err
    while seen is not None:
        if isinstance(seen, OSError):
            return describe_os_error(seen, "the checkpoint") or str(seen)
        if isinstance(seen, UserError):
            return str(seen)
        seen = seen.__cause__ or seen.__context__
    return " ".join("".join(traceback.format_exception_only(err)).split())
