# SPDX-License-Identifier: Apache-2.0
"""The manifest of a checkpoint: the size and SHA-256 of each of its files, and what differs from it on disk."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sparsek_megatron.files import fsync_path
from sparsek_megatron.training.write_file import size_and_sha256

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes and its SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


def record_of(path: Path) -> FileRecord:
    """Size and checksum of a file as it is read back."""
    return FileRecord(*size_and_sha256(path))


def write_manifest(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Write and flush `manifest.json`, the last file of a checkpoint."""
    path = folder / MANIFEST
    files = {name: asdict(records[name]) for name in sorted(records)}
    path.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    fsync_path(path)


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """Records by file name.

    Raises:
        ValueError: the manifest is missing or is not one, in words.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {str(name): FileRecord(int(r["bytes"]), str(r["sha256"])) for name, r in files.items()}
    except OSError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{MANIFEST} is damaged") from None


def check_sizes(folder: Path) -> str | None:
    """What is wrong with a checkpoint as far as file sizes tell, None if nothing. Reads no file but the manifest."""
    try:
        records = read_manifest(folder)
    except ValueError as err:
        return str(err)
    for name, record in records.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != record.bytes:
            return f"{name} has {size} bytes of {record.bytes}"
    return None


def check_contents(
    folder: Path, *, names: Collection[str] | None = None, share: int = 0, shares: int = 1
) -> str | None:
    """What is wrong with files by checksum, None if nothing; call `check_sizes` first.

    names: the files to look at, by default all. Of these every `shares`-th from number `share` on: the ranks of a run
    take a share each.
    """
    records = read_manifest(folder)
    looked_at = sorted(records if names is None else records.keys() & set(names))
    for name in looked_at[share::shares]:
        record = records[name]
        try:
            found = record_of(folder / name)
        except OSError as err:
            return f"{name} cannot be read ({err.strerror})"
        if found != record:
            return f"{name} is damaged (its checksum differs)"
    return None
