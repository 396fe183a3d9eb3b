# SPDX-License-Identifier: Apache-2.0
"""Dense Megatron checkpoints into SparseK models and back.

A SparseK model is its dense model plus the scorers: every other parameter has the same name, shape and
sharding. So a dense checkpoint loads by leaving the scorers at their initial values, and a SparseK model
exports by leaving them out.

Megatron's distributed checkpoints keep their metadata as a pickle, which torch reads as one: load those that you trust.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

logger = logging.getLogger(__name__)

Model = torch.nn.Module | Sequence[torch.nn.Module]

SCORER_PART = ".self_attention.scorer."


def is_scorer_key(key: str) -> bool:
    """Whether a state-dict key belongs to a scorer."""
    return SCORER_PART in key


def dense_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A model's (sharded) state dict without the scorers: that of the dense model of the same shape."""
    return {key: value for key, value in state_dict.items() if not is_scorer_key(key)}


def load_dense_state_dict(
    model: torch.nn.Module, state_dict: Mapping[str, Any], *, source: str = "memory"
) -> list[str]:
    """Load a dense model's state dict into a SparseK model.

    Returns the scorer keys left at their initial values. Logs one line. Raises ValueError where a key other than
    a scorer's is missing, or one is not in the model.
    """
    answer = model.load_state_dict(state_dict, strict=False)
    missing = [key for key in answer.missing_keys if not key.endswith("_extra_state")]
    unexpected = [key for key in answer.unexpected_keys if not key.endswith("_extra_state")]
    initialised = [key for key in missing if is_scorer_key(key)]
    wrong = [key for key in missing if not is_scorer_key(key)]
    if wrong or unexpected:
        raise ValueError(
            f"{source} is not a dense checkpoint of this model: {len(wrong)} keys missing {wrong[:3]}, "
            f"{len(unexpected)} unknown {unexpected[:3]}; build both with the same configuration"
        )
    loaded = len(state_dict) - len(unexpected)
    logger.info(
        "loaded %d tensors of a dense model from %s; %d scorer tensors keep their initial values",
        loaded,
        source,
        len(initialised),
    )
    return initialised


def _sharded(model: MegatronModule, *, stacked: bool) -> dict[str, Any]:
    """The dense part of the model's sharded state dict, layers stacked in one tensor or under their own keys."""
    config = model.config
    kept = config.hetereogenous_dist_checkpoint
    config.hetereogenous_dist_checkpoint = not stacked
    try:
        return dense_state_dict(model.sharded_state_dict())
    finally:
        config.hetereogenous_dist_checkpoint = kept


def _stored_layout(keys: Iterable[str]) -> tuple[str, bool]:
    """(what precedes `decoder.` in the keys of a checkpoint's model, whether its layers are stacked).

    An optimizer's state has keys that end in the same names.
    """
    for key in keys:
        found = re.match(r"(.*?)decoder\.layers\.(\d+\.)?", key)
        if found and "optimizer." not in found.group(1):
            return found.group(1), found.group(2) is None
    raise ValueError("the checkpoint has no decoder.layers.* tensors: it is not one of a Megatron GPT")


def _chunks(model: Model) -> list[Any]:
    """The GPT models of this rank: one, or several under a virtual pipeline."""
    return unwrap_model([model] if isinstance(model, torch.nn.Module) else list(model))


def load_dense_checkpoint(model: Model, folder: str | Path) -> list[str]:
    """Load a dense model's distributed checkpoint, saved under any tensor and pipeline split, into a SparseK model.

    model: this pipeline stage's GPT model, or the list of its chunks under a virtual pipeline; each chunk may as well
    be loaded in a call of its own. An optimizer must be made after. folder: an `iter_...` folder of
    `dist_checkpointing`, as Megatron-LM writes it, with an optimizer's state or without, layers stacked or under keys
    of their own. Every rank calls it. Returns the scorer keys left at their initial values. Logs one line a chunk.

    Raises ValueError where the checkpoint is not one of this model.
    """
    prefix, stacked = _stored_layout(dist_checkpointing.load_tensors_metadata(str(folder)))
    initialised = []
    for chunk in _chunks(model):
        wanted = _sharded(chunk, stacked=stacked)
        for tensor in wanted.values():
            if hasattr(tensor, "key"):
                tensor.key = prefix + tensor.key
        try:  # one chunk of a virtual pipeline need not cover the checkpoint: no check that all ranks' do
            loaded: Any = dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)
        except CheckpointException as err:
            reason, _ = next(iter(err.failures.values()))
            raise ValueError(
                f"{folder} is not a dense checkpoint of this model: {' '.join(str(reason).split())}; build both with "
                "the same configuration"
            ) from err
        # `loaded` has Megatron-LM's arguments, iteration and the like besides.
        initialised += load_dense_state_dict(chunk, {key: loaded[key] for key in wanted}, source=str(folder))
    return initialised


def save_dense_checkpoint(model: Model, folder: str | Path, *, stacked: bool = False) -> None:
    """Save a SparseK model as a dense model's distributed checkpoint (without the scorers). Every rank calls it.

    model: this pipeline stage's GPT model, or the list of all its chunks under a virtual pipeline. folder: made where
    it does not exist. stacked: save homogeneous layers as one stacked tensor each, as older Megatron checkpoints do.

    Raises ValueError for some chunks of a virtual pipeline only.
    """
    chunks = _chunks(model)
    count = chunks[0].config.virtual_pipeline_model_parallel_size or 1
    if len(chunks) != count:
        raise ValueError(
            f"save_dense_checkpoint got {len(chunks)} of the {count} model chunks of a virtual pipeline stage: one "
            "call writes the whole checkpoint; pass the list of all of them"
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    state = {f"model{i}": _sharded(chunk, stacked=stacked) for i, chunk in enumerate(chunks)}
    dist_checkpointing.save(state, str(folder))
