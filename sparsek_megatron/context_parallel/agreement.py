# SPDX-License-Identifier: Apache-2.0
"""Ranks that were started with different settings, found before they compute something else each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist


def check_agreement(
    settings: Any,
    store: dist.Store,  # pyright: ignore[reportPrivateImportUsage]
    rank: int,
    world_size: int,
    *,
    name: str = "settings",
) -> None:
    """Compare a dataclass or mapping on all ranks, and name the first field that differs.

    Ranks exchange a hash through the store; only where one differs are the values themselves looked at. Keys of the
    store start with `name`, which must be new in each call.

    Raises ValueError, on every rank, naming the field, the ranks and their values.
    """
    values = dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else dict(settings)  # pyright: ignore
    text = json.dumps({key: repr(value) for key, value in sorted(values.items())})
    store.set(f"{name}/text/{rank}", text)
    store.set(f"{name}/hash/{rank}", hashlib.sha256(text.encode()).hexdigest())
    hashes = [store.get(f"{name}/hash/{other}") for other in range(world_size)]
    odd = next((other for other in range(world_size) if hashes[other] != hashes[0]), None)
    if odd is None:
        return
    mine, theirs = (json.loads(store.get(f"{name}/text/{other}")) for other in (0, odd))
    raise ValueError(f"ranks disagree on their configuration: {_difference(mine, theirs, odd)}")


def _difference(first: Mapping[str, str], other: Mapping[str, str], rank: int) -> str:
    for field in sorted(first.keys() | other.keys()):
        if first.get(field) != other.get(field):
            return (
                f"{field} is {first.get(field, 'missing')} on rank 0 and {other.get(field, 'missing')} on rank {rank}; "
                "start every rank with the same settings"
            )
    raise AssertionError("equal settings have equal hashes")
