# SPDX-License-Identifier: Apache-2.0
"""Bring standard input to the disk: a program of its own, which the checkpoint writer starts for each file.

    python -I -S write_file.py PATH PARENT [--read-back]

It writes, flushes, reads the file back from the disk if asked, and prints its size and SHA-256, or the error, as JSON.
A thread that hashes in pieces would take the interpreter's lock from the training thread thousands of times a second.
The standard library alone is imported: it starts in milliseconds. If the parent is gone when the input ends, the input
was cut off, and it ends without an answer.
"""

import hashlib
import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

PIECE = 8 << 20  # bytes


def size_and_sha256(path: str | os.PathLike[str]) -> tuple[int, str]:
    """Size in bytes and SHA-256 in hexadecimal of a file as it is read back."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        size = sum(map(len, _pieces(stream.readinto, digest)))
    return size, digest.hexdigest()


def write(path: str, parent: int, *, read_back: bool) -> tuple[int, str] | None:
    """Size and SHA-256 of the file, once it is on the disk; None where the parent process ended first.

    Raises:
        OSError: it cannot be written, or what is on the disk is not what was written.
    """
    size, digest = 0, hashlib.sha256()
    with open(path, "wb", buffering=0) as stream:
        for piece in _pieces(lambda buffer: os.readv(0, [buffer]), digest):
            size += len(piece)
            while piece:
                piece = piece[stream.write(piece) :]
        if os.getppid() != parent:
            return None
        os.fsync(stream.fileno())
        if read_back:  # else it would see the page cache and not the disk
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if read_back and size_and_sha256(path) != (size, digest.hexdigest()):
        raise OSError(f"{os.path.basename(path)} reads back other than it was written: the disk is failing")
    return size, digest.hexdigest()


def _pieces(read_into: Callable[[memoryview], int | None], digest: Any) -> Iterator[memoryview]:
    """What `read_into` gives, in pieces that hold until the next is asked for. A second thread adds them to `digest`,
    which is complete when they end.
    """
    buffers = [memoryview(bytearray(PIECE)) for _ in range(3)]
    hashed: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as hasher:
        for buffer in itertools.cycle(buffers):
            if len(hashed) == len(buffers):
                hashed.popleft().result()
            filled = 0
            while filled < PIECE and (count := read_into(buffer[filled:])):
                filled += count
            if not filled:
                break
            hashed.append(hasher.submit(digest.update, buffer[:filled]))
            yield buffer[:filled]


def main() -> None:
    os.nice(19)  # training comes first
    try:
        answer = write(sys.argv[1], int(sys.argv[2]), read_back="--read-back" in sys.argv[3:])
    except OSError as err:
        print(json.dumps({"errno": err.errno, "error": err.strerror or str(err)}))
    else:
        if answer is not None:
            print(json.dumps(answer))


if __name__ == "__main__":
    main()
