# SPDX-License-Identifier: Apache-2.0
"""The Triton backend as torch custom ops: fake kernels for compilation, autograd, and the public composition.

`sparsek::attention` takes a finished selection and the keys it speaks of (E keys in `selection.types`), so a recomputed
forward (activation checkpointing) and CUDA graphs see plain tensors in and out. Its backward also returns the score
gradient, from per-key and per-query gate gradients and the intervals of F (`score_gradient`), and refuses to be
differentiated itself.
"""

from __future__ import annotations

import os

import torch

from sparsek_kernels.attention.backward_key import attention_backward_key
from sparsek_kernels.attention.backward_query import attention_backward_query
from sparsek_kernels.attention.forward import attention_forward
from sparsek_kernels.attention.plan import HEAD_DIMS, MAX_GROUP, AttentionPlan, plan_for
from sparsek_kernels.selection import Selection, score_gradient, select


def _unpack(query: torch.Tensor, key: torch.Tensor, selected: tuple) -> tuple[AttentionPlan, Selection]:
    """Plan and selection of a call from the arguments both ops end with (`_SELECTION` below)."""
    *tensors, cu_seqlens, topk, window, stride, pool, past, gate, softmax_scale = selected
    sizes = {
        "topk": topk,
        "window": window,
        "stride": stride,
        "pool": pool,
        "past": past,
        "cu_seqlens": cu_seqlens,
    }
    selection = Selection(*tensors, **sizes)
    return plan_for(query, key, selection, gate=gate, softmax_scale=softmax_scale), selection


def _attention(query, key, value, scores, *selected):
    """(out [b, s, hq, d], lse [b, hq, s] fp32 in log2 units) on a selection's tensors."""
    plan, selection = _unpack(query, key, selected)
    return attention_forward(plan, query, key, value, scores.transpose(1, 2), selection)


def _attention_fake(query, key, value, scores, *_selected):
    b, s, hq, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((b, hq, s), dtype=torch.float32)


def _attention_backward(d_out, query, key, value, scores, out, lse, *selected):
    """(d_query, d_key, d_value, d_scores), shaped like their inputs, contiguous."""
    plan, selection = _unpack(query, key, selected)
    row_scores = scores.transpose(1, 2).contiguous()
    inputs = (query, key, value, row_scores, selection)
    if d_out.stride(-1) != 1:
        d_out = d_out.contiguous()
    d_query, delta, query_sum = attention_backward_query(plan, *inputs, out, d_out, lse)
    d_key, d_value, key_sum = attention_backward_key(plan, *inputs, d_out, lse, delta)
    d_scores = score_gradient(selection, key_sum, query_sum)
    return d_query, d_key, d_value, d_scores.contiguous()


def _attention_backward_fake(d_out, query, key, value, scores, *_rest):
    return tuple(x.new_empty(x.shape) for x in (query, key, value, scores))


def _save(ctx, inputs, output) -> None:
    *tensors, topk, window, stride, pool, past, gate, softmax_scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.settings = (topk, window, stride, pool, past, gate, softmax_scale)


def _backward(ctx, d_out, _d_lse):
    *inputs, out, lse = ctx.saved_tensors
    query, key, value, scores, *selection, cu_seqlens = inputs
    gradients = torch.ops.sparsek.attention_backward(
        d_out, query, key, value, scores, out, lse, *selection, cu_seqlens, *ctx.settings
    )
    return (*gradients, *(None,) * 15)


# `Library` rather than `custom_op`: its calls cost tens of microseconds less on the host.
_SELECTION = (
    "Tensor threshold, Tensor threshold_low, Tensor evict, Tensor lists, Tensor fraction_start, Tensor fraction_end, "
    "Tensor fraction_size, Tensor? cu_seqlens, int topk, int window, int stride, int pool, SymInt past, "
    "str gate, float softmax_scale"
)
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor scores"
_LIBRARY = torch.library.Library("sparsek", "FRAGMENT")
_LIBRARY.define(f"attention({_INPUTS}, {_SELECTION}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"attention_backward(Tensor d_out, {_INPUTS}, Tensor out, Tensor lse, {_SELECTION}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")
torch.library.register_fake("sparsek::attention", _attention_fake, lib=_LIBRARY)
torch.library.register_fake("sparsek::attention_backward", _attention_backward_fake, lib=_LIBRARY)
torch.library.register_autograd("sparsek::attention", _backward, setup_context=_save, lib=_LIBRARY)


class _EagerAttention(torch.autograd.Function):
    """The op's autograd without torch.library's: that one looks at every argument once per argument, 0.14 ms a call."""

    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():  # else the op's own autograd is asked, which has nothing to do
            output = torch.ops.sparsek.attention(*inputs)
        # Here: with `setup_context`, torch inspects this function's signature at every call.
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, d_out, d_lse):
        if not torch.is_grad_enabled():
            return _backward(ctx, d_out, d_lse)
        with torch.no_grad():  # create_graph=True
            found = _backward(ctx, d_out, d_lse)
        return (*_DifferentiableOnce.apply(*found[:4], d_out, *ctx.saved_tensors[:4]), *found[4:])


class _DifferentiableOnce(torch.autograd.Function):
    """Four gradients, and what they depend on: without it a second derivative would silently be zero."""

    @staticmethod
    def forward(ctx, d_query, d_key, d_value, d_scores, *_depends_on):
        return tuple(x.view_as(x) for x in (d_query, d_key, d_value, d_scores))

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "the triton backend of sparsek_attention is differentiable once; use backend='torch' for second derivatives"
        )


def _check_supported(query: torch.Tensor, key: torch.Tensor) -> None:
    if not query.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise NotImplementedError(
            f"query is on {query.device}: the triton backend needs CUDA; use backend='torch'"
        )
    if query.dtype == torch.float64:
        raise NotImplementedError(
            "query is float64: the triton backend computes in fp32; use backend='torch'"
        )
    if query.shape[-1] not in HEAD_DIMS:
        raise NotImplementedError(
            f"query has head dimension {query.shape[-1]}; the triton backend has {HEAD_DIMS}"
        )
    if query.shape[2] // key.shape[2] > MAX_GROUP:
        raise NotImplementedError(
            f"query has {query.shape[2] // key.shape[2]} heads per key head; the triton backend has up to {MAX_GROUP}"
        )


def attend_selected(query, key, value, scores, selection, *, gate: str, softmax_scale: float) -> torch.Tensor:
    """The custom op on a finished selection: key, value [b, E, hkv, d], scores [b, E, hkv] of its E keys."""
    _check_supported(query, key)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    attention = torch.ops.sparsek.attention if torch.compiler.is_compiling() else _EagerAttention.apply
    return attention(
        query,
        key,
        value,
        scores,
        selection.threshold,
        selection.threshold_low,
        selection.evict,
        selection.lists,
        selection.fraction_start,
        selection.fraction_end,
        selection.fraction_size,
        selection.cu_seqlens,
        selection.topk,
        selection.window,
        selection.stride,
        selection.pool,
        selection.past,
        gate,
        softmax_scale,
    )[0]


def triton_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: torch.Tensor,
    *,
    topk: int,
    window: int,
    stride: int,
    pool: int,
    gate: str,
    softmax_scale: float,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """`sparsek_attention` on CUDA, arguments already validated: selection, then attention on it."""
    _check_supported(query, key)
    with torch.no_grad():
        selection = select(
            scores,
            topk=topk,
            window=window,
            stride=stride,
            pool=pool,
            hard=pool == topk,
            cu_seqlens=cu_seqlens,
        )
    return attend_selected(query, key, value, scores, selection, gate=gate, softmax_scale=softmax_scale)
