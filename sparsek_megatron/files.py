# SPDX-License-Identifier: Apache-2.0
"""Files that are either complete or absent: write aside, fsync, rename."""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sparsek_megatron.errors import UserError

_LOCK = ".lock"
_DAY = 24 * 3600


def fsync_path(path: Path) -> None:
    """Flush a file's or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_sibling(path: Path) -> Path:
    """A name next to `path`, on the same file system, that no reader looks for."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` only once the block ends without an exception."""
    partial = temporary_sibling(path)
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        publish(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def publish(partial: Path, final: Path) -> None:
    """Rename a finished file or folder into place and make the new name durable."""
    os.replace(partial, final)
    fsync_path(final.parent)


def require_writable_folder(folder: Path, flag: str) -> None:
    """Create `folder` if needed and prove that files can be written there.

    Raises:
        UserError: naming `flag`, when the folder cannot be created or written.
    """
    probe = folder / f".write-probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
    except OSError as err:
        raise UserError(
            f"{flag} {folder}: cannot write there ({err.strerror}); choose another folder"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def require_free_space(folder: Path, needed_bytes: int, flag: str) -> None:
    """Raise `UserError` when the disk of `folder` has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"{flag} {folder}: {needed_bytes / 1e9:.2f} GB needed but {free / 1e9:.2f} GB free on that disk; "
            "free some space or choose another folder"
        )


def lock_folder(folder: Path, flag: str) -> IO[Any]:
    """Hold `folder` for this process until the returned file is closed or the process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    stream = open(folder / _LOCK, "w", encoding="utf-8")  # noqa: SIM115 - open as long as the lock is held
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        if err.errno in (errno.EWOULDBLOCK, errno.EACCES):
            stream.close()
            raise UserError(f"{flag} {folder}: another run is writing there; wait for it or end it") from None
        if err.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # a file system without locks
            raise
    with contextlib.suppress(OSError):  # a full disk: `remove_abandoned` then takes it for another machine's
        os.write(stream.fileno(), socket.gethostname().encode())
    return stream


def remove_abandoned(folder: Path) -> None:
    """Remove a folder that a process had made for itself and held by `lock_folder`, if that process has ended.

    What cannot be told stays: a folder on a file system without locks; and for a day after it was last written one
    that another machine holds, whose locks some file systems do not show, or that is not held yet.
    """
    lock = folder / _LOCK
    with contextlib.suppress(OSError):
        own = lock.is_file() and lock.read_text(encoding="utf-8") == socket.gethostname()
        written = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        if not own and time.time() - written < _DAY:
            return
        with open(lock, "a", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        folder.rmdir()  # NFS keeps what holds an open file
