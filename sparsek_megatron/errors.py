# SPDX-License-Identifier: Apache-2.0
"""The one exception for what a user can fix, and how a command-line program reports it."""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

EXIT_USAGE = 2
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
    """A `UserError` that the other processes of a run may not see: a file or a disk of this rank's own."""


def describe_os_error(err: OSError, fallback: str = "the output") -> str | None:
    """One line for an error of the file system that the user can fix, None for any other `OSError`."""
    if err.errno not in _UNWRITABLE:
        return None
    where = err.filename if err.filename is not None else fallback
    return f"cannot write {where}: {os.strerror(err.errno)}; free space there or choose another output folder"


@contextlib.contextmanager
def report_user_errors(output: str = "the output") -> Iterator[None]:
    """Turn a `UserError`, or a full or unwritable disk, into one line on stderr and exit code 2.

    One line for the whole run: what every rank sees, rank 0 says. A `RankError` is said by any rank, by the others
    only if rank 0, which would end the run, has not spoken within two seconds. Any other exception keeps its
    traceback: that one is a defect of the program.
    """
    try:
        yield
    except OSError as err:
        described = describe_os_error(err, output)
        if described is None:
            raise
        _report(described, everywhere=True)
    except UserError as err:
        _report(str(err), everywhere=isinstance(err, RankError))


def _report(message: str, *, everywhere: bool) -> NoReturn:
    first = os.environ.get("RANK", "0") == "0"
    if everywhere and not first:
        time.sleep(2)
    if everywhere or first:
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USAGE)
