# SPDX-License-Identifier: Apache-2.0
"""The one exception for what a user can fix, and how a command-line program reports it."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

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


def describe_os_error(err: OSError, fallback: str = "the output") -> str | None:
    """One line for an error of the file system that the user can fix, None for any other `OSError`."""
    if err.errno not in _UNWRITABLE:
        return None
    where = err.filename if err.filename is not None else fallback
    return f"cannot write {where}: {os.strerror(err.errno)}; free space there or choose another output folder"


@contextlib.contextmanager
def report_user_errors(output: str = "the output") -> Iterator[None]:
    """Turn a `UserError`, or a full or unwritable disk, into one line on stderr and exit code 2.

    Under a launcher only rank 0 prints: every rank validates the same input and would say the same.
    Any other exception keeps its traceback: that one is a defect of the program.
    """
    try:
        yield
    except UserError as err:
        message = str(err)
    except OSError as err:
        described = describe_os_error(err, output)
        if described is None:
            raise
        message = described
    else:
        return
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USAGE)
