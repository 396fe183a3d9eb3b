# SPDX-License-Identifier: Apache-2.0
"""The attention of each arm, in the same layer: stock self attention with another core attention, or SparseK.

dense    torch SDPA with the cuDNN backend
window   flex_attention over a sliding window of topk + window keys
sparsek  this project's specs
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from training_benchmark.shapes import causal_pairs, window_pairs

from sparsek_megatron import SparseKConfig
from sparsek_megatron.specs import get_sparsek_block_spec
from sparsek_megatron.training.flops import mean_attended_keys

ARMS = ("dense", "window", "sparsek")


class _CoreAttention(MegatronModule):
    """Built and called like Megatron's core attention; causal, over this rank's heads."""

    def __init__(
        self, config: TransformerConfig, *args: Any, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        assert config.kv_channels is not None
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """query [s, b, np/tp, hn], key and value [s, b, ng/tp, hn] -> [s, b, np/tp * hn]."""
        out = self.attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
        return out.permute(2, 0, 1, 3).flatten(2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same on [b, heads, s, hn]."""
        raise NotImplementedError


class DenseCoreAttention(_CoreAttention):
    """Dense causal attention: cuDNN's kernels on a GPU, torch's own on CPU."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        backend = SDPBackend.CUDNN_ATTENTION if query.is_cuda else SDPBackend.MATH
        grouped = key.shape[1] != query.shape[1]
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.scale, enable_gqa=grouped
            )


FLEX_ELEMENTS = 2**31
"""flex_attention counts offsets in int32; beyond, it reads elsewhere without a word (pytorch issue 190857)."""


def _near(x: Tensor) -> Tensor:
    """`x`, or a copy without gaps where its last element lies further from its first than flex_attention counts."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x if last < FLEX_ELEMENTS else x.contiguous()


class WindowCoreAttention(_CoreAttention):
    """Each query attends to the `width` most recent keys, by a compiled flex_attention.

    Values are a view of the fused QKV product and lie too far apart for its offsets before anything else does; they are
    copied then.
    """

    width = 0
    _masks: dict[int, Any] = {}  # noqa: RUF012 - one per length, shared by all layers
    _compiled: Any = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        length, width = query.shape[2], self.width
        cls = type(self)
        if length not in cls._masks:

            def within(b: Any, h: Any, i: Any, j: Any) -> Any:
                return (j <= i) & (i - j < width)

            cls._masks[length] = create_block_mask(
                within, None, None, length, length, device=str(query.device), _compile=True
            )
            cls._compiled = cls._compiled or torch.compile(flex_attention, dynamic=False)
        grouped = key.shape[1] != query.shape[1]
        query, key, value = (_near(x) for x in (query, key, value))
        return cls._compiled(
            query, key, value, block_mask=cls._masks[length], scale=self.scale, enable_gqa=grouped
        )


def attended_pairs(arm: str, tokens: int, sparsek: SparseKConfig) -> float:
    """(query, key) pairs that the arm's attention is defined on, for one head."""
    if arm == "dense":
        return causal_pairs(tokens)
    if arm == "window":
        return window_pairs(tokens, sparsek.topk + sparsek.window)
    return tokens * mean_attended_keys(
        tokens, topk=sparsek.topk, window=sparsek.window, stride=sparsek.stride
    )


def block_spec(arm: str, config: TransformerConfig, sparsek: SparseKConfig) -> Any:
    """Layer specs of an arm, alike but for the attention: norms, linear layers and MLP are those of SparseK's spec."""
    if arm == "sparsek":
        return get_sparsek_block_spec(config, sparsek=sparsek)
    core = DenseCoreAttention if arm == "dense" else WindowCoreAttention
    WindowCoreAttention.width = sparsek.topk + sparsek.window
    block = get_sparsek_block_spec(config, sparsek=sparsek)
    return dataclasses.replace(
        block, layer_specs=[_stock_with(core, layer) for layer in block.layer_specs or []]
    )


def _stock_with(core: type, layer: Any) -> Any:
    """SparseK's layer spec with megatron-core's own self attention around another core attention."""
    attention = layer.submodules.self_attention
    attention = dataclasses.replace(
        attention,
        module=SelfAttention,
        params={"attn_mask_type": attention.params["attn_mask_type"]},
        submodules=dataclasses.replace(attention.submodules, core_attention=ModuleSpec(module=core)),
    )
    return dataclasses.replace(
        layer, submodules=dataclasses.replace(layer.submodules, self_attention=attention)
    )
