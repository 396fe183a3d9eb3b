# SPDX-License-Identifier: Apache-2.0
"""SparseK attention in Megatron's core attention slot: queries, keys, values and scores in, attention out.

Legend: s sequence length, b batch, np query heads, ng KV heads, hn head dimension, tp = tensor_model_parallel_size;
t tokens of packed (THD) sequences.
"""

from __future__ import annotations

import math
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from sparsek_kernels import sparsek_attention
from torch import Tensor

from sparsek_megatron import compat, refuse
from sparsek_megatron.config import SparseKConfig
from sparsek_megatron.context_parallel import context_parallel_attention
from sparsek_megatron.environment import settings_from_environment
from sparsek_megatron.inference import CachedScores, attend_cached
from sparsek_megatron.packing import packed_boundaries


def apart_from_projection(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """(key, value), copied where backward would keep all of the QKV projection for them.

    They are views of it, or values alone where RoPE turned the keys. Where queries are one too, nothing is copied.
    """
    storage = value.untyped_storage()
    alone = storage.nbytes() == value.nbytes or storage.data_ptr() == query.untyped_storage().data_ptr()
    if alone or not value.requires_grad:
        return key, value
    shared = key.untyped_storage().data_ptr() == storage.data_ptr()
    return (key.contiguous() if shared else key), value.contiguous()


class SparseKCoreAttention(MegatronModule):
    """Causal SparseK attention over the heads of this tensor-parallel rank; no parameters.

    It communicates under context parallelism only (`sparsek_megatron.context_parallel`): s then counts this rank's
    tokens, sharded in Megatron's zigzag layout, and the boundaries of packed sequences stay global.
    Built and called like Megatron's core attention, with the scores as `attention_bias`. `softmax_scale`
    None means 1 / sqrt(hn). `sparsek` None reads the environment.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        *,
        sparsek: SparseKConfig | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config=config)
        refuse.check_model_config(config)
        refuse.check_mask_type(attn_mask_type, packed=True)
        if attention_type != "self":
            raise NotImplementedError(f"attention_type={attention_type!r}: SparseK is self attention")
        if attention_dropout:
            raise NotImplementedError(f"attention_dropout={attention_dropout}: use 0")
        assert config.kv_channels is not None
        self.sparsek = sparsek or settings_from_environment()[0]
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self.cp_comm_type = cp_comm_type
        self.cp_group = compat.context_parallel_group(config, pg_collection)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | CachedScores | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention output [s, b, np/tp * hn], or [t, np/tp * hn] for packed sequences.

        query [s, b, np/tp, hn], key and value [s, b, ng/tp, hn], or [t, heads, hn]; attention_bias: scores
        [b, s, ng/tp] fp32, or with the cache that generation continues.
        """
        if isinstance(attention_bias, CachedScores):
            return attend_cached(query, key, value, attention_bias)
        boundaries = packed_boundaries(packed_seq_params)
        refuse.check_mask_type(attn_mask_type, packed=boundaries is not None)
        refuse.check_attention_mask(attention_mask)
        if attention_bias is None:
            raise ValueError(
                "attention_bias is None: SparseKCoreAttention takes its scores there; use it inside "
                "SparseKSelfAttention"
            )
        if boundaries is None:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        else:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        key, value = apart_from_projection(query, key, value)
        settings = self.sparsek
        options: dict[str, Any] = {
            "topk": settings.topk,
            "window": settings.window,
            "stride": settings.stride,
            "pool": settings.pool,
            "gate": settings.gate,
            "softmax_scale": self.softmax_scale,
            "cu_seqlens": boundaries,
            "backend": settings.backend,
        }
        if self.cp_group is not None:
            options |= {"group": self.cp_group, "cp_comm_type": self.cp_comm_type}
            out = context_parallel_attention(query, key, value, attention_bias, **options)
        else:
            out = sparsek_attention(query, key, value, attention_bias, **options)
        if boundaries is None:
            return out.transpose(0, 1).flatten(2)
        return out.squeeze(0).flatten(1)
