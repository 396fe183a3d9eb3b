# SPDX-License-Identifier: Apache-2.0
"""The one exception for what a user can fix, and how a command-line program reports it."""

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

EXIT_USAGE = 2
EXIT_UNREAD = 128 + signal.SIGPIPE
_UNWRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EIO,
}


class UserError(ValueError):
    """Bad input: one line that names the flag or file, its value and the fix."""


class RankError(UserError):
    """A `UserError` that this rank, whichever it is, tells for the whole run."""


def describe_os_error(err: OSError, fallback: str = "the output") -> str | None:
    """One line for an error of the file system that the user can fix, None for any other `OSError`."""
    if err.errno not in _UNWRITABLE:
        return None
    where = err.filename if err.filename is not None else fallback
    return f"cannot write {where}: {os.strerror(err.errno)}; free space there or choose another output folder"


def describe_memory_error(err: RuntimeError) -> str:
    """What torch's `OutOfMemoryError` says, in one line and without its advice on the allocator's settings."""
    return " ".join(str(err).partition(" If reserved")[0].split())


def write_whole_lines() -> None:
    """Let a line leave in one write, so that processes on one terminal or pipe never mix theirs.

    With PYTHONUNBUFFERED set, `print` writes a line and its end separately: another rank's line can come between.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)


@contextlib.contextmanager
def report_user_errors() -> Iterator[None]:
    """What every program runs in: a `UserError`, or a full or unwritable disk, becomes one line on stderr and exit
    code 2, lines are written whole, and Ctrl-C, or a reader of the output that has gone (`| head`), ends it quietly.

    Under a launcher rank 0 says what every rank sees, and a rank that raises `RankError` speaks for the run. Any
    other exception keeps its traceback: that one is a defect of the program.
    """
    write_whole_lines()
    try:
        yield
    except BrokenPipeError:
        _forget_unread_output()
        sys.exit(EXIT_UNREAD)
    except OSError as err:
        message = describe_os_error(err)
        if message is None:
            raise
        _report(message)
    except UserError as err:
        _report(str(err), everywhere=isinstance(err, RankError))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


@contextlib.contextmanager
def refusals_for_the_user() -> Iterator[None]:
    """What the library refuses in the block, ValueError or NotImplementedError of one line, as a `UserError`."""
    try:
        yield
    except (ValueError, NotImplementedError) as err:
        raise UserError(str(err)) from None


def _forget_unread_output() -> None:
    """Let what nobody reads any more go nowhere: Python would complain when it writes the rest at the end."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _report(message: str, *, everywhere: bool = False) -> NoReturn:
    if everywhere or os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USAGE)
