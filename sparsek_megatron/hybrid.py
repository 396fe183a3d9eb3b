# SPDX-License-Identifier: Apache-2.0
"""The stack of megatron-core 0.19's `HybridModel` with SparseK in its attention layers.

`--spec sparsek_megatron.hybrid sparsek_hybrid_stack_spec`, with settings from the environment, or
`HybridModel(hybrid_stack_spec=get_sparsek_hybrid_stack_spec(config, sparsek=...))`. megatron-core's own hybrid stack
exists for Transformer Engine only, and so does this one. Importing this module raises NotImplementedError on
versions without `HybridModel`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from sparsek_megatron import compat, refuse
from sparsek_megatron.config import SparseKConfig
from sparsek_megatron.environment import settings_from_environment
from sparsek_megatron.layer_pattern import dense_indices
from sparsek_megatron.specs import to_sparsek


def _hybrid_stack_spec(sparsek: SparseKConfig | None) -> ModuleSpec:
    stock: Any = compat.stock_hybrid_stack_spec()
    attention = to_sparsek(stock.submodules.attention_layer, sparsek, local=False, before_config=True)
    return dataclasses.replace(
        stock, submodules=dataclasses.replace(stock.submodules, attention_layer=attention)
    )


def get_sparsek_hybrid_stack_spec(
    config: TransformerConfig, *, sparsek: SparseKConfig | None = None
) -> ModuleSpec:
    """Spec for `HybridModel(hybrid_stack_spec=...)`: attention layers ("*" in the pattern) become SparseK.

    Mamba, MLP, MoE and multi-token prediction slots are megatron-core's own. Layer indices of a layer pattern in
    `sparsek` count all symbols of the hybrid pattern. sparsek None reads the environment. Raises
    NotImplementedError naming the flag for a configuration that SparseK attention does not support, and ValueError
    where Transformer Engine is missing.
    """
    refuse.check_model_config(config)
    if not compat.have_transformer_engine():
        raise ValueError(
            "megatron-core's hybrid stack needs Transformer Engine, which is not installed: use GPTModel "
            "with get_sparsek_layer_spec"
        )
    sparsek = sparsek or settings_from_environment()[0]
    dense_indices(sparsek, config.num_layers)
    return _hybrid_stack_spec(sparsek)


sparsek_hybrid_stack_spec = _hybrid_stack_spec(None)
