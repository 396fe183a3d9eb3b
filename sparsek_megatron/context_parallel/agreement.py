# SPDX-License-Identifier: Apache-2.0
"""Ranks that were started with different settings, found before they compute something else each.

`check_agreement` waits for all ranks, which a program can do where it starts. A layer cannot: not every rank builds
one (a pipeline stage of dense layers). `check_first_layer` compares with whoever came first, and waits for nobody.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import weakref
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import distributed_c10d

_groups = itertools.count()
_compared_in: weakref.ref[Any] | None = None


def check_agreement(
    settings: Any,
    store: dist.Store,  # pyright: ignore[reportPrivateImportUsage]
    rank: int,
    world_size: int,
    *,
    name: str = "settings",
) -> None:
    """Compare a dataclass or mapping on all ranks, and name the fields that differ.

    Ranks exchange a hash through the store; only where one differs are the values themselves looked at. Keys of the
    store start with `name`, which must be new in each call.

    Raises ValueError, on every rank, naming the fields, two ranks and their values.
    """
    text = json.dumps(_words(settings))
    store.set(f"{name}/text/{rank}", text)
    store.set(f"{name}/hash/{rank}", hashlib.sha256(text.encode()).hexdigest())
    hashes = [store.get(f"{name}/hash/{other}") for other in range(world_size)]
    odd = next((other for other in range(world_size) if hashes[other] != hashes[0]), None)
    if odd is None:
        return
    mine, theirs = (json.loads(store.get(f"{name}/text/{other}")) for other in (0, odd))
    raise ValueError(_difference(mine, 0, theirs, odd))


def check_agreement_with_the_first(
    settings: Any,
    store: dist.Store,  # pyright: ignore[reportPrivateImportUsage]
    rank: int,
    *,
    name: str,
) -> None:
    """Compare a dataclass or mapping with that of the first rank that called this with the key `name` of the store.

    One exchange with the store; waits for no other rank. Raises ValueError naming the fields, both ranks and their
    values, on the ranks that came later.
    """
    mine = _words(settings)
    other, theirs = json.loads(store.compare_set(name, "", json.dumps([rank, mine])))
    if theirs != mine:
        raise ValueError(_difference(theirs, other, mine, rank))


def check_first_layer(sparsek: Any, cp_comm_type: Any, pg_collection: Any) -> None:
    """Where the first SparseK layer of a process is built: its settings against the other ranks' of its model.

    sparsek: the `SparseKConfig`; cp_comm_type: of the model's configuration; pg_collection: the layer's groups. With
    Megatron's own groups the model's ranks are all ranks. Where a caller gave its own, other ranks may hold another
    model: then those of the tensor- and of the context-parallel group, which build the same layers.

    Raises ValueError as `check_agreement_with_the_first`.
    """
    global _compared_in
    if not dist.is_initialized() or dist.get_world_size() == 1 or dist.get_backend() == "fake":
        return  # the other ranks of the "fake" backend do not exist
    world = dist.group.WORLD
    if _compared_in is not None and _compared_in() is world:
        return
    _compared_in = weakref.ref(world)
    settings = {**dataclasses.asdict(sparsek), "cp_comm_type": cp_comm_type}
    # The store may outlive a process group: one made later in the same processes compares under another name.
    name, store = f"sparsek_settings/{next(_groups)}", distributed_c10d._get_default_store()
    for ranks in _model_ranks(pg_collection):
        check_agreement_with_the_first(settings, store, dist.get_rank(), name=f"{name}/{ranks}")


def _model_ranks(pg_collection: Any) -> list[str]:
    """Sets of ranks that must agree, in words."""
    if pg_collection.tp is parallel_state.get_tensor_model_parallel_group(check_initialized=False):
        return ["all"]
    return [str(dist.get_process_group_ranks(group)) for group in (pg_collection.tp, pg_collection.cp)]


def _words(settings: Any) -> dict[str, str]:
    values = dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else dict(settings)  # pyright: ignore
    return {key: repr(value) for key, value in sorted(values.items())}


def _difference(first: Mapping[str, str], rank: int, other: Mapping[str, str], other_rank: int) -> str:
    fields = [x for x in sorted(first.keys() | other.keys()) if first.get(x) != other.get(x)]
    words = (
        f"{x} is {first.get(x, 'missing')} on rank {rank} and {other.get(x, 'missing')} on rank {other_rank}"
        for x in fields
    )
    return (
        f"ranks disagree on their configuration: {', '.join(words)}; start every rank with the same settings"
    )
