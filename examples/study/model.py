# SPDX-License-Identifier: Apache-2.0
"""The model of an arm: Megatron's GPTModel with the library's layer spec, and the arm's scores."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from arms import Arm, Model, Table
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsek_megatron import SparseKCoreAttention, SparseKSelfAttention, get_sparsek_block_spec
from sparsek_megatron.cpu import enable_cpu


class StudySelfAttention(SparseKSelfAttention):
    """`SparseKSelfAttention` with the scores that the arm asks for. `arm`: the arm."""

    def __init__(self, *args: Any, arm: Arm, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.arm = arm
        if self.scorer.slope is not None:
            self.scorer.slope.requires_grad_(not arm.fixed_slope)

    def scores(self, hidden_states: Tensor, *args: Any, **keywords: Any) -> Tensor:
        """[b, s, KV heads] fp32."""
        s, b = hidden_states.shape[:2]
        heads = self.scorer.num_heads
        if self.arm.scores == "random":
            return torch.rand(b, s, heads, device=hidden_states.device)
        if self.arm.scores in ("recent", "first"):
            position = torch.arange(s, device=hidden_states.device, dtype=torch.float32)
            position = position if self.arm.scores == "recent" else -position
            return position[None, :, None].expand(b, s, heads).contiguous()
        if self.arm.scores == "keys":
            return self.position_term(s, hidden_states.device).expand(b, s, heads)
        scores = super().scores(hidden_states, *args, **keywords)
        if self.arm.shared:
            scores = scores.mean(-1, keepdim=True).expand(b, s, heads).contiguous()
        return scores

    def position_term(self, length: int, device: torch.device) -> Tensor:
        """[1, s, KV heads] fp32: the scorer's slope * position / L_ref; [1, s, 1] zeros where it has no slope."""
        scorer = self.scorer
        if scorer.slope is None:
            return torch.zeros(1, length, 1, device=device)
        return scorer.position_term(length)


class KeyScoreCoreAttention(SparseKCoreAttention):
    """SparseK attention whose scores are a learned vector per KV head times the RMS-normalised key, after RoPE.

    To these it adds the position term [b, s, KV heads] fp32, which `StudySelfAttention` gives as `attention_bias`.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **keywords: Any) -> None:
        super().__init__(config, *args, **keywords)
        assert config.kv_channels is not None and config.num_query_groups is not None
        spread = self.sparsek.score_spread / math.sqrt(config.kv_channels)
        device = "cpu" if config.use_cpu_initialization else "cuda"
        shape = (config.num_query_groups, config.kv_channels)
        self.score_weight = torch.nn.Parameter(torch.randn(shape, device=device) * spread)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, attention_bias: Tensor, **keywords: Any
    ) -> Tensor:
        normalised = F.rms_norm(key.float(), key.shape[-1:])
        scores = (normalised * self.score_weight.float()).sum(-1).transpose(0, 1) + attention_bias
        scores = scores.contiguous()
        return super().forward(query, key, value, *args, attention_bias=scores, **keywords)


class DenseCoreAttention(MegatronModule):
    """Full causal attention by torch's scaled_dot_product_attention."""

    def __init__(self, config: TransformerConfig, *_args: Any, **_keywords: Any) -> None:
        super().__init__(config=config)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_keywords: Any) -> Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        backend = SDPBackend.FLASH_ATTENTION if query.is_cuda else SDPBackend.MATH
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def start_megatron(seed: int) -> torch.device:
    """One-process Megatron on the GPU, or on CPU where there is none; reseeded at every call."""
    on_gpu = torch.cuda.is_available()
    if not torch.distributed.is_initialized():
        if not on_gpu:
            enable_cpu()
        meeting = f"file://{tempfile.mkdtemp()}/ranks"
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return torch.device("cuda" if on_gpu else "cpu")


def layer_for(arm: Arm, layer: Any, index: int) -> Any:
    """The library's layer spec with the arm's self attention and core attention."""
    attention = layer.submodules.self_attention
    core = attention.submodules.core_attention
    if arm.scores == "dense" or index in arm.full_layers:
        core = ModuleSpec(module=DenseCoreAttention)
    elif arm.scores == "keys":
        core = dataclasses.replace(core, module=KeyScoreCoreAttention)
    attention = dataclasses.replace(
        attention,
        module=StudySelfAttention,
        params={**attention.params, "arm": arm},
        submodules=dataclasses.replace(attention.submodules, core_attention=core),
    )
    return dataclasses.replace(
        layer, submodules=dataclasses.replace(layer.submodules, self_attention=attention)
    )


def build(arm: Arm, table: Table, vocabulary: int, device: torch.device) -> GPTModel:
    """The arm's model, bf16 on a GPU and fp32 on CPU; weights depend on the current seed and not on the arm."""
    size: Model = table.model
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = TransformerConfig(
        **dataclasses.asdict(size),
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_cpu_initialization=device.type == "cpu",
        gradient_accumulation_fusion=False,
    )
    longest = max((table.length, *table.eval_lengths))
    sparsek = dataclasses.replace(arm.sparsek, reference_length=table.length)
    block = get_sparsek_block_spec(config, sparsek=sparsek, transformer_impl="local")
    assert block.layer_specs is not None
    layers = [layer_for(arm, layer, index) for index, layer in enumerate(block.layer_specs)]
    return GPTModel(
        config,
        dataclasses.replace(block, layer_specs=layers),  # pyright: ignore[reportArgumentType]
        vocab_size=vocabulary,
        max_sequence_length=longest,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    ).to(device)
