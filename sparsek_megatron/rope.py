# SPDX-License-Identifier: Apache-2.0
"""Fused rotary embedding without Transformer Engine: compiled by torch, in the slot that megatron-core left empty.

`--apply-rope-fusion` needs a kernel that megatron-core takes from Transformer Engine. Without it RoPE is about ten
passes over queries and keys; compiled it is one. Cosines stay outside what is compiled: fused, they would be computed
again for every head, from angles that grow with the position, which is slow arithmetic at long contexts.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import TransformerConfig
from torch import Tensor


def turn(t: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """t [s, b, heads, d], its first r dimensions turned; cos, sin [s, 1, 1, r] in fp32; computed in theirs."""
    rotated = cos.shape[-1]
    part = t[..., :rotated].to(cos.dtype)
    out = part * cos + rope_utils._rotate_half(part, interleaved) * sin
    return torch.cat((out.to(t.dtype), t[..., rotated:]), dim=-1)


@functools.lru_cache(maxsize=1)
def _cosines(freqs: Tensor, captured: bool) -> tuple[Tensor, Tensor]:
    """(cosines, sines) of the last angles, by identity: megatron-core gives all layers of a forward the same tensor, so
    that backward keeps one table and not two of every layer.

    captured: while a CUDA graph is captured. It makes a table of its own: an earlier one lives only until other angles
    come, and replays would read what lies there then.
    """
    return freqs.cos(), freqs.sin()


@functools.cache
def _compiled() -> Any:
    return torch.compile(turn)


def fused_rope(
    t: Tensor, freqs: Tensor, transpose_output_memory: bool = False, interleaved: bool = False
) -> Tensor:
    """RoPE of t [s, b, heads, d] with angles freqs [s, 1, 1, r], called as Transformer Engine's is.

    Cosines are not rounded to the dtype of t, as megatron-core's are. On CPU nothing is compiled.
    """
    function = _compiled() if t.is_cuda else turn
    captured = t.is_cuda and torch.cuda.is_current_stream_capturing()
    return function(t, *_cosines(freqs, captured), interleaved)


def use_fused_rope(config: TransformerConfig) -> None:
    """Set `apply_rope_fusion`, by Transformer Engine's kernel where megatron-core found it, else by a compiled one.

    For models whose batches are not packed: packed ones need Transformer Engine's kernel, and megatron-core says so.
    Raises NotImplementedError for multi-latent attention and for sections of angles (mRoPE).
    """
    if config.multi_latent_attention:
        raise NotImplementedError("--multi-latent-attention: has its own fused RoPE; leave this one out")
    if getattr(config, "mrope_section", None) is not None:
        raise NotImplementedError(
            "--mrope-section: angles differ between rows; leave --apply-rope-fusion out"
        )
    if rope_utils.fused_apply_rotary_pos_emb is None:
        rope_utils.fused_apply_rotary_pos_emb = fused_rope  # pyright: ignore[reportAttributeAccessIssue]
    config.apply_rope_fusion = True
