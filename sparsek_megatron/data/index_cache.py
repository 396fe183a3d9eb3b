# SPDX-License-Identifier: Apache-2.0
"""The folder of mcore's index cache: named by what its indices are made of, and there only when it is complete.

mcore names an index by the path of its data, not by the data, and writes it in place: it would read the index of other
data prepared under the same prefix, and the half of one whose writing was interrupted. It also lets NumPy unpickle
what lies there in the place of an array, before 0.19 without restriction: a pickle's code would run. Here such a folder
is made anew, and nothing is unpickled.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from sparsek_megatron.data.fingerprint import index_sha256
from sparsek_megatron.errors import UserError
from sparsek_megatron.files import fsync_path, lock_folder, publish, remove_abandoned

_DIGITS = 32


def complete_cache(
    cache: Path, prefixes: Sequence[str], settings: Mapping[str, Any], build: Callable[[Path], object]
) -> Path:
    """The folder below `cache` that holds the indices of the datasets at `prefixes`, made first where it is not there,
    or where a file of it is no array.

    Call it on every rank. Indices depend on the documents' lengths (the `.idx` files) and on `settings`, which can be
    written as JSON. `build(folder)` makes the datasets with `folder` as mcore's `path_to_cache`, on every rank. What
    builds that were killed have left below `cache` is removed first.

    Raises:
        UserError: the cache cannot be written. Nothing half-written is left.
    """
    is_first = dist.get_rank() == 0
    plan: list[Any] = [None]
    lock = None
    if is_first:
        for stale in cache.glob(f".{'[0-9a-f]' * _DIGITS}.partial-*"):
            remove_abandoned(stale)
        folder = cache / _digest(prefixes, settings)
        partial = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:8]}")
        _put_away_damaged(folder, partial.with_name(partial.name + "-damaged"))
        plan = [(folder, None if folder.is_dir() else partial)]
    dist.broadcast_object_list(plan, src=0)
    folder, partial = plan[0]
    if partial is None:
        return folder
    try:
        if is_first:
            partial.mkdir(parents=True)
            lock = lock_folder(partial, "--data-cache-path")
        build(partial)
        dist.barrier()  # until no rank reads there
        if is_first:
            _publish(partial, folder)
        dist.barrier()
    except Exception as err:
        cause = err if isinstance(err, OSError) else err.__cause__  # mcore wraps it
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"--data-cache-path {cache}: the index cache cannot be written there ({cause.strerror or cause}); free "
            "space or choose another folder"
        ) from err
    finally:
        if lock:
            lock.close()
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


@contextlib.contextmanager
def plain_arrays() -> Iterator[None]:
    """Within it `numpy.load` unpickles nothing, whatever it is asked to: mcore asks for it with every index."""
    load = np.load
    np.load = lambda *arguments, **options: load(*arguments, **{**options, "allow_pickle": False})
    try:
        yield
    finally:
        np.load = load


def _put_away_damaged(folder: Path, name: Path) -> None:
    """Rename an index folder with a file that is no array (cut off, or a pickle) to `name`, and remove it."""
    for path in sorted(folder.glob("*.npy")):
        try:
            np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as err:
            print(f"warning: {path}: not an array ({err}); the index is made anew", file=sys.stderr, flush=True)
            os.replace(folder, name)
            shutil.rmtree(name, ignore_errors=True)
            return


def _digest(prefixes: Sequence[str], settings: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for prefix in prefixes:
        digest.update(bytes.fromhex(index_sha256(prefix)))
    return digest.hexdigest()[:_DIGITS]


def _publish(partial: Path, folder: Path) -> None:
    for path in (*partial.iterdir(), partial):
        fsync_path(path)
    try:
        publish(partial, folder)
    except OSError:
        if not folder.is_dir():  # another run may have published the same one
            raise
