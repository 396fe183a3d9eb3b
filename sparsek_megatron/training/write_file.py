# SPDX-License-Identifier: Apache-2.0
"""Bring standard input to the disk: a program of its own, which the checkpoint writer starts for each file.

    python -I -S write_file.py PATH PARENT [--read-back]

It writes, flushes, reads the file back from the disk if asked, and prints its size and SHA-256, or the error, as JSON.
A thread that hashes in pieces would take the interpreter's lock from the training thread thousands of times a second.
The standard library alone is imported: it starts in milliseconds. If the parent is gone when the input ends, the input
was cut off, and it ends without an answer.
"""

import hashlib
import json
import os
import sys

PIECE = 1 << 20  # bytes; what a pipe holds at most


def size_and_sha256(path: str | os.PathLike[str]) -> tuple[int, str]:
    """Size in bytes and SHA-256 in hexadecimal of a file as it is read back."""
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return stream.tell(), digest.hexdigest()


def write(path: str, parent: int, *, read_back: bool) -> tuple[int, str] | None:
    """Size and SHA-256 of the file, once it is on the disk; None where the parent process ended first.

    Raises:
        OSError: it cannot be written, or what is on the disk is not what was written.
    """
    size, digest, buffer = 0, hashlib.sha256(), memoryview(bytearray(PIECE))
    with open(path, "wb", buffering=0) as stream:
        while count := os.readv(0, [buffer]):
            piece = buffer[:count]
            digest.update(piece)
            while piece:
                piece = piece[stream.write(piece) :]
            size += count
        if os.getppid() != parent:
            return None
        os.fsync(stream.fileno())
        if read_back:  # else it would see the page cache and not the disk
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if read_back and size_and_sha256(path) != (size, digest.hexdigest()):
        raise OSError(f"{os.path.basename(path)} reads back other than it was written: the disk is failing")
    return size, digest.hexdigest()


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
