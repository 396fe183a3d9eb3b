# SPDX-License-Identifier: Apache-2.0
"""Dense Megatron checkpoints into SparseK models and back.

A SparseK model is its dense model plus the scorers: every other parameter has the same name, shape and
sharding. So a dense checkpoint loads by leaving the scorers at their initial values, and a SparseK model
exports by leaving them out.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.transformer.module import MegatronModule

logger = logging.getLogger(__name__)

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


def _stored_prefix(keys: list[str]) -> tuple[str, bool]:
    """(what precedes `decoder.` in a checkpoint's keys, whether its layers are stacked)."""
    for key in keys:
        found = re.match(r"(.*?)decoder\.layers\.(\d+\.)?", key)
        if found:
            return found.group(1), found.group(2) is None
    raise ValueError("the checkpoint has no decoder.layers.* tensors: it is not one of a Megatron GPT")


def load_dense_checkpoint(model: MegatronModule, folder: str | Path) -> list[str]:
    """Load a dense model's distributed checkpoint, saved under any tensor and pipeline split, into a SparseK
    model.

    folder: an `iter_...` folder of `dist_checkpointing`. Works for layers saved stacked or under keys of
    their own. Returns the scorer keys left at their initial values. Logs one line. Every rank calls it.
    """
    metadata = dist_checkpointing.load_tensors_metadata(str(folder))
    prefix, stacked = _stored_prefix(list(metadata))
    wanted = _sharded(model, stacked=stacked)
    for tensor in wanted.values():
        if hasattr(tensor, "key"):
            tensor.key = prefix + tensor.key
    loaded: Any = dist_checkpointing.load(wanted, str(folder))
    return load_dense_state_dict(model, loaded, source=str(folder))


def save_dense_checkpoint(model: MegatronModule, folder: str | Path, *, stacked: bool = False) -> None:
    """Save a SparseK model as a dense model's distributed checkpoint (without the scorers). Every rank calls
    it.

    stacked: save homogeneous layers as one stacked tensor each, as older Megatron checkpoints do.
    """
    dist_checkpointing.save(_sharded(model, stacked=stacked), str(folder))
