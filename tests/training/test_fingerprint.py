# SPDX-License-Identifier: Apache-2.0
"""Data that changes under its name between a checkpoint and the run that resumes it is named."""

import dataclasses
import os
import shutil
import time
from pathlib import Path

import pytest

from sparsek_megatron.data.fingerprint import changed_data, fingerprint
from sparsek_megatron.data.paths import DataPaths


@pytest.fixture
def data(prepared, tmp_path) -> str:
    """A dataset of its own that may be changed."""
    prefix = str(tmp_path / "data")
    for suffix in (".bin", ".idx"):
        shutil.copy(prepared.train + suffix, prefix + suffix)
        os.utime(prefix + suffix, (0, 0))  # any change is later, however coarse the file system's clock
    return prefix


def lines(paths: DataPaths, before: dict) -> list[str]:
    now = {prefix: fingerprint(prefix) for prefix in paths.prefixes()}
    return changed_data(paths, before, now, step=3)


def rewrite(path: str, *, at: int, byte: int) -> None:
    with open(path, "r+b") as stream:
        stream.seek(at)
        stream.write(bytes([byte]))


def test_data_that_stayed_or_has_no_record_is_not_named(prepared, data):
    before = {data: fingerprint(data), prepared.valid: fingerprint(prepared.valid)}
    paths = DataPaths(train=(data,), valid=(prepared.valid,))
    for suffix in (".bin", ".idx"):  # copied again: other files and times, the same content
        content = Path(data + suffix).read_bytes()
        Path(data + suffix).unlink()
        Path(data + suffix).write_bytes(content)
    assert lines(paths, before) == []
    assert lines(paths, {}) == []
    assert lines(DataPaths(train=("0.5", data, "0.5", prepared.train), valid=(prepared.valid,)), before) == []


def test_extended_data_is_named_once_whatever_the_flag(prepared, data):
    before = {data: fingerprint(data)}
    size = Path(data + ".bin").stat().st_size
    with open(data + ".bin", "ab") as stream:
        stream.write(bytes(8))
    with open(data + ".idx", "ab") as stream:
        stream.write(bytes(20))
    named = f"changed since the checkpoint of step 3: {data} (.bin had {size:,} bytes, has {size + 8:,}): "
    order = "from step 4 on samples are drawn in another order"
    (line,) = lines(DataPaths(blend=("0.5", data, "0.3", prepared.train, "0.2", data)), before)
    assert line.startswith(f"warning: --data-path: {named}{order}"), line
    (line,) = lines(DataPaths(train=(prepared.train,), valid=(data,)), before)
    assert line == f"warning: --valid-data-path: {named}validation losses from here on are those of other data"
    train, valid = lines(DataPaths(train=(data,), valid=(data,)), before)
    assert order in train and "validation losses" in valid


def test_other_documents_and_other_tokens_of_the_same_size_are_told_apart(data):
    before, paths = {data: fingerprint(data)}, DataPaths(blend=(data,))
    rewrite(data + ".idx", at=Path(data + ".idx").stat().st_size // 2, byte=0xA5)
    (line,) = lines(paths, before)
    assert "(.idx lists documents of other lengths): from step 4 on samples are drawn in another order" in line
    before = {data: fingerprint(data)}
    content = Path(data + ".bin").read_bytes()
    Path(data + ".bin").write_bytes(content[::-1])
    (line,) = lines(paths, before)
    assert "(.bin holds other tokens): from step 4 on samples hold other tokens" in line and "order" not in line


@pytest.mark.parametrize("at", [0, -1, 100 * 10**9 // 15])
def test_a_hundred_gigabytes_are_looked_at_in_an_instant(data, at):
    size = 100 * 10**9
    with open(data + ".bin", "r+b") as stream:
        stream.truncate(0)
        stream.truncate(size)  # a hole: no disk is used
    begun = time.perf_counter()
    before = fingerprint(data)
    assert time.perf_counter() - begun < 5 and before.bin_bytes == size
    rewrite(data + ".bin", at=at % size, byte=1)
    now = fingerprint(data)
    assert now.bin_sample_sha256 != before.bin_sample_sha256
    assert dataclasses.replace(now, bin_sample_sha256=before.bin_sample_sha256) == before


def test_short_data_is_read_whole(data):
    for size in (1, 65_535, 65_537, 16 * 65_536):
        content = bytearray(size)
        Path(data + ".bin").write_bytes(content)
        before = fingerprint(data)
        for at in {0, size // 3, size // 2, size - 1}:
            rewrite(data + ".bin", at=at, byte=1)
            assert fingerprint(data) != before, (size, at)
            rewrite(data + ".bin", at=at, byte=0)
        assert fingerprint(data) == before
