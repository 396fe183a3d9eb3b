# SPDX-License-Identifier: Apache-2.0
"""Fused rotary embedding without Transformer Engine: one kernel each way in the slot that megatron-core left empty.

`--apply-rope-fusion` needs a kernel that megatron-core takes from Transformer Engine. Without it RoPE is about ten
passes over queries and keys, and the cosines of a token are computed for every layer from angles that grow with its
position, which is slow arithmetic at long contexts. Here a program computes them once for all heads of its tokens.

Legend: s sequence length, b batch, d head dimension, r <= d rotated dimensions, whose pairs (first, second) are
(i, i + r / 2), or (2 i, 2 i + 1) where interleaved; both of a pair have the same angle.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import TransformerConfig
from torch import Tensor

BLOCK_TOKENS = 16


@triton.jit
def _rotate_kernel(
    x, angles, out, tokens, heads, half,
    x_token, x_batch, x_head, angles_token, out_token, out_batch, out_head,
    BLOCK_TOKENS: tl.constexpr, BLOCK_HALF: tl.constexpr, STEP: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(s / BLOCK_TOKENS), b): one program owns all heads of BLOCK_TOKENS tokens. BACKWARD turns back."""
    o_tok = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    o_half = tl.arange(0, BLOCK_HALF)
    mask = (o_tok < tokens)[:, None] & (o_half < half)[None, :]
    first = o_half * STEP
    second = first + (half if STEP == 1 else 1)
    b_angle = tl.load(angles + o_tok[:, None] * angles_token + first[None, :], mask=mask, other=0.0)
    b_cos = tl.cos(b_angle.to(tl.float32))
    b_sin = tl.sin(b_angle.to(tl.float32))
    if BACKWARD:
        b_sin = -b_sin
    batch = tl.program_id(1).to(tl.int64)
    p_x = x + o_tok[:, None] * x_token + batch * x_batch
    p_out = out + o_tok[:, None] * out_token + batch * out_batch
    for _ in range(heads):
        b_1 = tl.load(p_x + first[None, :], mask=mask, other=0.0).to(tl.float32)
        b_2 = tl.load(p_x + second[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(p_out + first[None, :], (b_1 * b_cos - b_2 * b_sin).to(out.dtype.element_ty), mask=mask)
        tl.store(p_out + second[None, :], (b_2 * b_cos + b_1 * b_sin).to(out.dtype.element_ty), mask=mask)
        p_x += x_head
        p_out += out_head


def rotate(t: Tensor, angles: Tensor, *, interleaved: bool = False, backward: bool = False) -> Tensor:
    """t [s, b, heads, d] of any strides, turned by angles [s, r] (fp32), back where `backward`; in the dtype of t."""
    t = t if t.stride(-1) == 1 else t.contiguous()
    tokens, batch, heads, _ = t.shape
    rotated = angles.shape[1]
    half = rotated // 2
    out = torch.empty(t.shape, dtype=t.dtype, device=t.device)
    out[..., rotated:] = t[..., rotated:]
    kernel: Any = _rotate_kernel
    kernel[(-(-tokens // BLOCK_TOKENS), batch)](
        t, angles, out, tokens, heads, half,
        *t.stride()[:3], angles.stride(0), *out.stride()[:3],
        BLOCK_TOKENS=BLOCK_TOKENS,
        BLOCK_HALF=triton.next_power_of_2(half),
        STEP=2 if interleaved else 1,
        BACKWARD=backward,
    )  # fmt: skip
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(angles)
        ctx.interleaved = interleaved
        return rotate(t, angles, interleaved=interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (angles,) = ctx.saved_tensors
        return rotate(grads[0], angles, interleaved=ctx.interleaved, backward=True), None, None


def fused_rope(
    t: Tensor, freqs: Tensor, transpose_output_memory: bool = False, interleaved: bool = False
) -> Tensor:
    """RoPE of t [s, b, heads, d] with angles freqs [s, 1, 1, r], called as Transformer Engine's is.

    On a GPU cosines are not rounded to the dtype of t, as megatron-core's are. On CPU it is megatron-core's function.
    """
    if not t.is_cuda:
        return rope_utils._apply_rotary_pos_emb_bshd(t, freqs, rotary_interleaved=interleaved)
    rotated: Any = _Rotate.apply(t, freqs.flatten(1).contiguous(), interleaved)
    return rotated


def use_fused_rope(config: TransformerConfig) -> None:
    """Set `apply_rope_fusion`, by Transformer Engine's kernel where megatron-core found it, else by this module's.

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
