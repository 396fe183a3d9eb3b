# SPDX-License-Identifier: Apache-2.0
"""Fused rotary embedding without Transformer Engine: megatron-core's own formula, compiled.

`--apply-rope-fusion` needs a kernel that megatron-core takes from Transformer Engine. Without it RoPE is
about ten passes over queries and keys; compiled by torch it is one. Only the slot that megatron-core left
empty is filled.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import TransformerConfig
from torch import Tensor


@functools.cache
def _compiled() -> Any:
    return torch.compile(rope_utils._apply_rotary_pos_emb_bshd)


def _compiled_rope(
    t: Tensor, freqs: Tensor, transpose_output_memory: bool = False, interleaved: bool = False
) -> Tensor:
    """RoPE of t [s, b, heads, d] with angles freqs [s, 1, 1, d], called as Transformer Engine's is."""
    return _compiled()(t, freqs, rotary_interleaved=interleaved)


def use_fused_rope(config: TransformerConfig) -> None:
    """Set `apply_rope_fusion`, by Transformer Engine's kernel where megatron-core found it, else by a
    compiled one.

    For models on a GPU whose batches are not packed: packed ones need Transformer Engine's kernel, and
    megatron-core says so. Raises NotImplementedError for multi-latent attention.
    """
    if config.multi_latent_attention:
        raise NotImplementedError("--multi-latent-attention: has its own fused RoPE; leave this one out")
    if rope_utils.fused_apply_rotary_pos_emb is None:
        rope_utils.fused_apply_rotary_pos_emb = _compiled_rope  # pyright: ignore[reportAttributeAccessIssue]
    config.apply_rope_fusion = True
