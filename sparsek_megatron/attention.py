# SPDX-License-Identifier: Apache-2.0
"""SparseK attention in Megatron's self attention slot: it scores the tokens that its core attention selects from.

Core attention never sees hidden states, so the scores are computed in `SparseKSelfAttention` and travel to
`SparseKCoreAttention` as `attention_bias`, an argument that Megatron hands through untouched.

Legend: s sequence length, b batch, h hidden size, np query heads, ng KV heads, hn head dimension,
tp = tensor_model_parallel_size; t tokens of packed (THD) sequences.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.torch_norm import L2Norm
from torch import Tensor

from sparsek_megatron import compat, refuse
from sparsek_megatron.config import SparseKConfig
from sparsek_megatron.context_parallel import check_first_layer
from sparsek_megatron.core_attention import apart_from_projection
from sparsek_megatron.diagnostics import pool_overflow
from sparsek_megatron.environment import resolve_settings
from sparsek_megatron.inference import CachedScores, cache_rows, new_positions, rotary_at
from sparsek_megatron.norm import QKNorm
from sparsek_megatron.packing import check_packed_batch, packed_boundaries, token_positions
from sparsek_megatron.report import report_once
from sparsek_megatron.scoring import ScoringNetwork, reference_length


def complete_submodules(submodules: Any, config: TransformerConfig, *, fused_input_norm: bool) -> Any:
    """Self attention submodules of a spec made before the configuration, with the slots that depend on it."""
    if config.qk_l2_norm:
        return dataclasses.replace(submodules, q_layernorm=L2Norm, k_layernorm=L2Norm)
    if not config.qk_layernorm:
        return submodules
    norm = compat.transformer_engine_norm() if fused_input_norm else QKNorm
    return dataclasses.replace(submodules, q_layernorm=norm, k_layernorm=norm)


def refuse_missing_experts(config: TransformerConfig, layer_slots: dict[str, str]) -> None:
    """Refuse mixture of experts in a layer whose spec, made before the configuration, holds a dense MLP.

    Raises NotImplementedError naming the alternative.
    """
    if config.num_moe_experts is not None and layer_slots.get("mlp") != IdentityOp.__name__:
        raise NotImplementedError(
            f"--num-experts {config.num_moe_experts}: this spec object has dense MLPs; use the function "
            "sparsek_megatron.specs.sparsek_spec, or get_sparsek_block_spec(config)"
        )


class SparseKSelfAttention(SelfAttention):
    """Megatron's self attention with a `ScoringNetwork`, whose scores go to the core attention.

    sparsek           the settings; None reads the environment
    fused_input_norm  the QKV projection contains the layer's input norm (Transformer Engine), so that the
                      hidden states arriving here are the raw residual: the scorer then gets its own norm,
                      unless `sparsek.scorer_norm` decides otherwise
    before_config     the spec was made without the model's configuration: q/k norms are filled in here
    layer_slots       names of the classes in the layer's other slots, for the report on rank 0

    All other arguments are those of `SelfAttention`. Raises NotImplementedError for a configuration that
    SparseK attention does not support, naming the flag, and ValueError naming a setting that differs between ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        *args: Any,
        sparsek: SparseKConfig | None = None,
        fused_input_norm: bool = False,
        before_config: bool = False,
        layer_slots: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        refuse.check_model_config(config)
        refuse.check_running_script()
        if before_config:
            refuse_missing_experts(config, layer_slots or {})
            submodules = complete_submodules(submodules, config, fused_input_norm=fused_input_norm)
        super().__init__(config, submodules, layer_number, attn_mask_type, *args, **kwargs)
        self.sparsek, source = resolve_settings(sparsek)
        check_first_layer(self.sparsek, config.cp_comm_type, self.pg_collection)
        own_norm = fused_input_norm if self.sparsek.scorer_norm is None else self.sparsek.scorer_norm
        self.scorer = ScoringNetwork(config, self.sparsek, tp_group=self.pg_collection.tp, own_norm=own_norm)
        self.training_forwards = 0
        built = {name: type(module).__name__ for name, module in self.named_children()}
        length = reference_length(config, self.sparsek)
        report_once(self.sparsek, source, length, {**(layer_slots or {}), **built})

    def scores(self, hidden_states: Tensor, packed_seq_params: PackedSeqParams | None = None) -> Tensor:
        """Scores [b, s, ng/tp] fp32 of the whole sequence, or of this context-parallel rank's tokens of it.

        hidden_states [s, b, h], this rank's shard of it under sequence parallelism. Raises ValueError for packed
        sequences that do not fit it.
        """
        length = hidden_states.shape[0] * (
            self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        )
        boundaries = packed_boundaries(packed_seq_params)
        cp = compat.context_parallel_group(self.config, self.pg_collection)
        shard = {} if cp is None else {"cp": cp.size(), "cp_rank": cp.rank()}
        if boundaries is not None:
            tokens = length * shard.get("cp", 1)
            check_packed_batch(boundaries, rows=hidden_states.shape[1], tokens=tokens)
        return self.scorer(hidden_states, token_positions(length, boundaries, hidden_states.device, **shard))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        *args: Any,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_params: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Output [s, b, h] (its shard under sequence parallelism) and bias, as `SelfAttention.forward`.

        With a static inference context the tokens continue the sequences of the layer's cache in it
        (`sparsek_megatron.inference`).

        Raises NotImplementedError for dynamic inference contexts, an attention bias, or a mask that is not plain
        causal.
        """
        context = inference_context if inference_context is not None else inference_params
        refuse.check_inference(
            context,
            training=self.training,
            packed=packed_seq_params is not None,
            context_parallel_size=self.config.context_parallel_size,
        )
        refuse.check_attention_mask(attention_mask, continued=context is not None)
        if attention_bias is not None:
            raise NotImplementedError("attention_bias: not supported; use RoPE for relative positions")
        if context is not None:
            cached: Any = self._cached_scores(hidden_states, context)
            return super().forward(
                hidden_states,
                None,  # pyright: ignore[reportArgumentType]
                key_value_states,
                context,
                *args,
                attention_bias=cached,
                **kwargs,
            )
        scores = self.scores(hidden_states, packed_seq_params)
        self._watch_pool(scores, packed=packed_seq_params is not None)
        return super().forward(
            hidden_states,
            None,  # pyright: ignore[reportArgumentType]
            key_value_states,
            None,
            *args,
            attention_bias=scores,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )

    def _cached_scores(self, hidden_states: Tensor, context: Any) -> CachedScores:
        """Scores of new tokens at their positions, and the rows of this layer's cache that take them."""
        tokens = hidden_states.shape[0] * (
            self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        )
        batch = hidden_states.shape[1]
        cache = cache_rows(context, self, self.sparsek, batch=batch, tokens=tokens)
        positions = new_positions(context, self.layer_number, tokens)
        return CachedScores(self.scorer(hidden_states, positions), cache)

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The new tokens as they are, with the rotary angles of their positions: the cache keeps what came before.

        Megatron's own method, which allocates and fills its dense key/value memory, is for other layers.
        """
        if inference_context is None:
            return query, key, value, rotary_pos_emb, self.attn_mask_type, None
        if rotary_pos_emb is not None:
            positions = new_positions(inference_context, self.layer_number, query.shape[0])
            refuse.check_rotary_rows(self.config, positions)
            rotary_pos_emb = tuple(rotary_at(table, positions) for table in rotary_pos_emb)
        return query, key, value, rotary_pos_emb, AttnMaskType.causal, None

    def _watch_pool(self, scores: Tensor, *, packed: bool) -> None:
        """Every `overflow_interval` training forwards, warn where the pool overflows too often.

        Looks at whole sequences only: not at packed ones, nor under context parallelism.
        """
        settings = self.sparsek
        packed = packed or self.config.context_parallel_size > 1
        if settings.overflow_warning is None or packed or not (self.training and torch.is_grad_enabled()):
            return
        self.training_forwards += 1
        if self.training_forwards % settings.overflow_interval or settings.hard_selection:
            return
        if scores.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        assert settings.pool is not None
        overflowing, looked_at = pool_overflow(
            scores, topk=settings.topk, window=settings.window, stride=settings.stride, pool=settings.pool
        )
        if looked_at and overflowing > settings.overflow_warning * looked_at:
            warnings.warn(
                f"layer {self.layer_number}: the pool of {settings.pool} overflows at {overflowing} of "
                f"{looked_at} refresh points (scores are too close together): raise SparseKConfig.pool or "
                "score_spread",
                stacklevel=2,
            )

    def _checkpointed_attention_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb: Any = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_unused: Any,
    ) -> Tensor:
        """Selective recompute with the scores as an explicit input of the checkpoint.

        Megatron closes over `attention_bias`; a tensor that carries gradients must be an input instead, or
        backward walks the scorer's graph twice.
        """

        core_attention: Any = self.core_attention

        def core(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
            return core_attention(
                query,
                key,
                value,
                None,
                attn_mask_type=attn_mask_type or self.attn_mask_type,
                attention_bias=scores,
                packed_seq_params=packed_seq_params,
            )

        key, value = apart_from_projection(query, key, value)
        return tensor_parallel.checkpoint(core, False, query, key, value, attention_bias)
