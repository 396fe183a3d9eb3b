# SPDX-License-Identifier: Apache-2.0
"""The model: mcore's `GPTModel` with RoPE, RMSNorm, GQA and SwiGLU, and SparseK in the attention slots."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from sparsek_megatron.async_tensor_parallel import use_async_tensor_parallel
from sparsek_megatron.context_parallel import shard_sequence
from sparsek_megatron.errors import refusals_for_the_user
from sparsek_megatron.memory import use_checkpoint_offload, use_chunked_loss, use_tiled_mlp
from sparsek_megatron.memory.chunked_loss import whole_logits_are_large
from sparsek_megatron.rope import use_fused_rope
from sparsek_megatron.specs import get_sparsek_block_spec
from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.validate import sparsek_config


def transformer_config(config: TrainingConfig, *, on_gpu: bool) -> TransformerConfig:
    """mcore's configuration of the model; bfloat16 on GPU unless told otherwise, float32 on CPU."""
    bf16 = uses_bf16(config, on_gpu=on_gpu)
    recompute: dict[str, Any] = {"recompute_granularity": config.recompute_granularity}
    if config.recompute_granularity == "full":
        recompute |= {
            "recompute_method": config.recompute_method, "recompute_num_layers": config.recompute_num_layers
        }  # fmt: skip
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.mlp_width,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.query_groups,
        kv_channels=config.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=on_gpu,  # SwiGLU in one compiled kernel each way, its input kept and not its output
        bias_dropout_fusion=on_gpu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=config.init_method_std,
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        sequence_parallel=config.sequence_parallel,
        context_parallel_size=config.context_parallel_size,
        cp_comm_type=config.cp_comm_type if config.context_parallel_size > 1 else None,
        use_cpu_initialization=not on_gpu,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
        **recompute,
    )


def uses_bf16(config: TrainingConfig, *, on_gpu: bool) -> bool:
    """Whether the weights are bfloat16."""
    return on_gpu if config.bf16 is None else config.bf16


def build_model(config: TrainingConfig, vocab_size: int, *, on_gpu: bool) -> GPTModel:
    """This rank's shard of the model, on CPU or on the current GPU.

    Raises:
        UserError: the attention does not support a setting.
    """
    # The score's position unit is a constant of the model, not of a sequence: stored with it.
    longest = config.max_position_embeddings or config.seq_length
    sparsek = dataclasses.replace(sparsek_config(config), reference_length=longest)
    megatron = transformer_config(config, on_gpu=on_gpu)
    if config.apply_rope_fusion:
        use_fused_rope(megatron)
    with refusals_for_the_user():
        spec = get_sparsek_block_spec(megatron, sparsek=sparsek)
    model = GPTModel(
        config=megatron,
        transformer_layer_spec=spec,  # pyright: ignore[reportArgumentType]
        vocab_size=config.padded_vocab_size(vocab_size),
        max_sequence_length=longest,
        position_embedding_type="rope",
        rotary_base=config.rotary_base,
        share_embeddings_and_output_weights=not config.untie_embeddings_and_output_weights,
    )
    save_memory(model, config, vocab_size)
    if config.async_tensor_parallel:
        with refusals_for_the_user():
            use_async_tensor_parallel(model)
    return model.cuda() if on_gpu else model


def save_memory(model: GPTModel, config: TrainingConfig, vocab_size: int) -> None:
    """Switch on what the settings ask for of `sparsek_megatron.memory`; the loss is chunked where logits are large."""
    tokens = config.micro_batch_size * config.seq_length // config.context_parallel_size
    shard = config.padded_vocab_size(vocab_size) // config.tensor_model_parallel_size
    chunk = config.loss_chunk_tokens
    if chunk or (chunk is None and whole_logits_are_large(tokens=tokens, vocabulary=shard)):
        use_chunked_loss(model, chunk_tokens=chunk)
    if config.recompute_granularity == "full":  # generation reads a run's settings without recompute
        offloaded, recomputed = config.cpu_offloading_num_layers, config.recompute_inputs
        use_checkpoint_offload(model, num_layers=offloaded, recompute_inputs=recomputed)
    if config.mlp_tile_tokens is not None:
        use_tiled_mlp(model, tile_tokens=config.mlp_tile_tokens)


def token_losses(model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """The training forward: losses [b, s] in nats, or this rank's logits [b, s, vocabulary / TP] without labels.

    tokens, labels: [b, s] int64, whole sequences. No attention mask is passed: SparseK attention is causal.
    Under context parallelism the result holds this rank's s / CP tokens.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    cp = parallel_state.get_context_parallel_world_size()
    if cp > 1:
        rank = parallel_state.get_context_parallel_rank()
        tokens, positions = (shard_sequence(x, cp, rank) for x in (tokens, positions))
        labels = None if labels is None else shard_sequence(labels, cp, rank)
    return model(input_ids=tokens, position_ids=positions, attention_mask=None, labels=labels)
