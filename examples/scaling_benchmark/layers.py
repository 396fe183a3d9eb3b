# SPDX-License-Identifier: Apache-2.0
"""The stack of layers that is measured, sparse or dense."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from scaling_benchmark.flags import Case, sparsek_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsek_megatron import get_sparsek_layer_spec
from sparsek_megatron.memory import use_tiled_mlp
from sparsek_megatron.specs import to_sparsek


class DenseAttention(MegatronModule):
    """Causal dense core attention by cuDNN (by torch's choice on CPU): query [s, b, heads, d] -> [s, b, heads * d]."""

    def __init__(self, config: TransformerConfig, *_args: Any, **_unused: Any) -> None:
        super().__init__(config=config)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_args: Any, **_unused: Any
    ):
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        backends = [SDPBackend.CUDNN_ATTENTION] if query.is_cuda else [SDPBackend.MATH]
        with sdpa_kernel(backends):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def build(args: argparse.Namespace, case: Case, device: torch.device) -> TransformerBlock:
    """The layers of one case, in bf16 on GPUs and fp32 on CPU."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    recompute: dict[str, Any] = {}
    if args.recompute:
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    config = TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.heads,
        num_query_groups=args.kv_heads,
        kv_channels=args.head_dim,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=case.tp,
        context_parallel_size=case.cp,
        sequence_parallel=case.tp > 1,
        cp_comm_type=args.cp_comm_type if case.cp > 1 else None,
        bf16=on_gpu,
        params_dtype=dtype,
        use_cpu_initialization=not on_gpu,
        gradient_accumulation_fusion=False,
        **recompute,
    )
    settings = sparsek_config(args)
    if case.side == "sparsek":
        spec = get_sparsek_layer_spec(config, sparsek=settings, transformer_impl="local")
    else:
        spec = to_sparsek(get_gpt_layer_local_spec(normalization="RMSNorm"), settings, local=True, dense=True)
        attention = spec.submodules.self_attention
        core: Any = ModuleSpec(module=DenseAttention)
        inner = dataclasses.replace(attention.submodules, core_attention=core)
        attention = dataclasses.replace(attention, submodules=inner)
        spec = dataclasses.replace(
            spec, submodules=dataclasses.replace(spec.submodules, self_attention=attention)
        )
    block = TransformerBlock(config, spec, post_layer_norm=False).to(device)
    return block if args.mlp_tile_tokens is None else use_tiled_mlp(block, tile_tokens=args.mlp_tile_tokens)
