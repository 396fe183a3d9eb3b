# SPDX-License-Identifier: Apache-2.0
"""`sparsek_attention`: argument checks, choice of backend, selection and attention in one call."""

from __future__ import annotations

import torch

from sparsek_kernels.attention.autograd import triton_attention
from sparsek_kernels.attention.reference import torch_attention
from sparsek_kernels.selection.api import check_cu_seqlens
from sparsek_kernels.settings import BACKENDS, GATES, pool_size, require_choice, scale_or_default

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sparsek_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: torch.Tensor,
    *,
    topk: int,
    window: int,
    stride: int = 64,
    pool: int | None = None,
    gate: str = "key_value",
    softmax_scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention to a sliding window and to the `topk` best-scored older keys, differentiable in the scores.

    For query i with refresh point c = stride * (i // stride), keys c - window < j <= i are attended with gate 1, and of
    the older keys j <= c - window the `topk` with the highest scores, with gate clamp(u_j - tau_c, 0, 1), tau_c
    the SparseK threshold (`sparsek`) of the `pool` best scores with mass `topk`. Sequences of at most window + topk
    tokens get dense causal attention exactly. Cost: O(s (topk + window)) time and memory.

    Args:
        query: [b, s, hq, d] fp16, bf16 or fp32 (torch backend: fp64 too); any strides with a contiguous last dimension.
        key, value: [b, s, hkv, d], same dtype; hq must be a multiple of hkv. All query heads of a group share the
            selection of their key/value head.
        scores: [b, s, hkv] fp32 (fp64 with fp64 inputs).
        topk: keys selected per query, at least 1.
        window: local keys per query, at least 1 (up to stride - 1 more between refresh points).
        stride: tokens between refresh points; 1 selects for every token.
        pool: candidates kept for the threshold, at most 16,384; default 4 * topk. `pool == topk` is hard selection:
            gates 1, and a score gradient of zero.
        gate: where the gate m acts. "key_value": logit scale * m * q.k and value m * v; "value": value m * v only;
            "logit": logit scale * q.k + log m.
        softmax_scale: default d ** -0.5.
        cu_seqlens: int32 [num_seqs + 1] boundaries of sequences packed along s (then b must be 1). Rows past the last
            boundary give 0. Its values are checked on the CPU only: reading them would wait for the device.
        backend: "triton" (CUDA; differentiable once), "torch" (anywhere, any number of times), or "auto": Triton on
            CUDA, torch on CPU.

    Returns:
        [b, s, hq, d], dtype of `query`.

    Raises:
        ValueError: a shape, dtype or setting that does not fit, naming the argument, its value and what would fit.
        NotImplementedError: a combination the chosen backend does not support.
    """
    check_tensors(query, key, value, scores)
    pool = pool_size(topk, window, stride, pool)
    require_choice("gate", gate, GATES)
    require_choice("backend", backend, BACKENDS)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, scores)
    attention = torch_attention if resolve_backend(backend, query) == "torch" else triton_attention
    return attention(
        query,
        key,
        value,
        scores,
        topk=topk,
        window=window,
        stride=stride,
        pool=pool,
        gate=gate,
        softmax_scale=scale_or_default(softmax_scale, query.shape[-1]),
        cu_seqlens=cu_seqlens,
    )


def resolve_backend(backend: str, query: torch.Tensor) -> str:
    """The backend to use: `auto` is Triton on CUDA and torch elsewhere."""
    if backend == "auto":
        return "triton" if query.is_cuda else "torch"
    return backend


def check_tensors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: torch.Tensor
) -> None:
    """ValueError for the first tensor that does not fit, with its value and what would."""
    for name, x, rank in (("query", query, 4), ("key", key, 4), ("value", value, 4), ("scores", scores, 3)):
        if x.dim() != rank:
            raise ValueError(f"{name} must have {rank} dimensions, got shape {tuple(x.shape)}")
        if x.device != query.device:
            raise ValueError(
                f"{name} is on {x.device} but query is on {query.device}; move them to one device"
            )
    b, s, hq, d = query.shape
    hkv = key.shape[2]
    if tuple(key.shape) != (b, s, hkv, d):
        raise ValueError(
            f"key has shape {tuple(key.shape)}; query {tuple(query.shape)} needs [{b}, {s}, hkv, {d}]"
        )
    if value.shape != key.shape:
        raise ValueError(f"value has shape {tuple(value.shape)}; it must equal key's {tuple(key.shape)}")
    if tuple(scores.shape) != (b, s, hkv):
        raise ValueError(f"scores has shape {tuple(scores.shape)}; key needs [{b}, {s}, {hkv}]")
    if hkv == 0 or hq % hkv:
        raise ValueError(f"query has {hq} heads, not a multiple of key's {hkv}")
    if s == 0:
        raise ValueError("query has no tokens (s = 0)")
    if key.dtype != query.dtype or value.dtype != query.dtype:
        raise ValueError(
            f"query, key and value must share a dtype, got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if query.dtype not in DTYPES:
        raise ValueError(f"query must be float16, bfloat16, float32 or float64, got {query.dtype}")
    wanted = torch.float64 if query.dtype == torch.float64 else torch.float32
    if scores.dtype != wanted:
        raise ValueError(f"scores has dtype {scores.dtype}; with {query.dtype} queries it must be {wanted}")
