# SPDX-License-Identifier: Apache-2.0
"""What a dataset was when a checkpoint was taken, so that a run that resumes on other data says so."""

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

from sparsek_megatron.data.paths import DataPaths, parse_blend

_BLOCKS = 16
_BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class Fingerprint:
    """A dataset's identity, as cheap to take as the start of a run allows.

    `idx_sha256` is of the whole `.idx`, which lists the documents' lengths: with the seed it settles the order of
    samples. `bin_sample_sha256` is of 16 blocks of 64 KiB spread evenly over the `.bin`, first and last among them
    (our choice: it takes 1 MiB of reading for any size); an edit between them that keeps every length is not seen.
    """

    bin_bytes: int
    bin_sample_sha256: str
    idx_sha256: str


def fingerprint(prefix: str) -> Fingerprint:
    """The fingerprint of the dataset at `prefix`."""
    path = prefix + ".bin"
    size = os.path.getsize(path)
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in range(_BLOCKS):
            stream.seek(max(0, size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK_BYTES))
    return Fingerprint(size, digest.hexdigest(), index_sha256(prefix))


def index_sha256(prefix: str) -> str:
    """SHA-256 of the `.idx` at `prefix`, in hexadecimal; read once by a process as long as the file stays."""
    path = prefix + ".idx"
    status = os.stat(path)
    return _file_sha256(path, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.cache
def _file_sha256(path: str, *_identity: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def changed_data(
    paths: DataPaths, before: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint], *, step: int
) -> list[str]:
    """A line for each data flag with prefixes that are not what they were (`before`) at the checkpoint of `step`.

    Prefixes without a fingerprint in `before` are passed over: they are new, or the checkpoint is from before these
    were recorded.
    """
    lines = []
    for flag, given in paths.by_flag():
        known = [prefix for prefix in dict.fromkeys(parse_blend(given)[0]) if prefix in before]
        changed = {prefix: (before[prefix], now[prefix]) for prefix in known if before[prefix] != now[prefix]}
        if not changed:
            continue
        named = ", ".join(f"{prefix} ({_difference(*pair)})" for prefix, pair in changed.items())
        if flag == "--valid-data-path":
            consequence = "validation losses from here on are those of other data"
        elif any(old.idx_sha256 != new.idx_sha256 for old, new in changed.values()):
            consequence = (
                f"from step {step + 1} on samples are drawn in another order, which may repeat or leave out some, and "
                "the run no longer repeats an uninterrupted one bitwise"
            )
        else:
            consequence = (
                f"from step {step + 1} on samples hold other tokens, and the run no longer repeats an uninterrupted "
                "one bitwise"
            )
        lines.append(f"warning: {flag}: changed since the checkpoint of step {step}: {named}: {consequence}")
    return lines


def _difference(before: Fingerprint, now: Fingerprint) -> str:
    if before.bin_bytes != now.bin_bytes:
        return f".bin had {before.bin_bytes:,} bytes, has {now.bin_bytes:,}"
    if before.idx_sha256 != now.idx_sha256:
        return ".idx lists documents of other lengths"
    return ".bin holds other tokens"
