# SPDX-License-Identifier: Apache-2.0
"""The scores of every SparseK layer for one text, from one forward pass of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparsek_megatron.attention import SparseKSelfAttention
from sparsek_megatron.config import SparseKConfig


@contextlib.contextmanager
def recorded_scores(model: torch.nn.Module) -> Iterator[dict[int, tuple[SparseKConfig, Tensor]]]:
    """Within it, a forward pass of the model leaves here, by layer index (from 0), the settings and the scores
    [b, s, n / tp] of this tensor-parallel rank's KV heads.
    """
    found: dict[int, tuple[SparseKConfig, Tensor]] = {}
    handles = []
    for module in model.modules():
        if isinstance(module, SparseKSelfAttention):

            def keep(_scorer: Any, _inputs: Any, scores: Tensor, *, attention: Any = module) -> None:
                found[attention.layer_number - 1] = (attention.sparsek, scores.detach().float().cpu())

            handles.append(module.scorer.register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def scores_of_all_heads(scores: Tensor, *, num_query_groups: int, group: Any) -> Tensor:
    """[b, s, n] from each tensor-parallel rank's [b, s, n / tp] (one head where n < tp). A collective over `group`."""
    shards: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(shards, scores, group=group)
    if num_query_groups < group.size():
        shards = shards[:: group.size() // num_query_groups]
    return torch.cat(shards, dim=-1)
