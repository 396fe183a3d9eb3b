# SPDX-License-Identifier: Apache-2.0
"""Which layers keep dense attention, by global layer index, whatever pipeline split builds them."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from sparsek_megatron import compat
from sparsek_megatron.attention import complete_submodules, refuse_missing_experts
from sparsek_megatron.config import SparseKConfig
from sparsek_megatron.environment import settings_from_environment


def dense_indices(sparsek: SparseKConfig, num_layers: int) -> frozenset[int]:
    """Global indices 0 ... num_layers - 1 of the layers that stay dense.

    Raises ValueError for an index outside the model, and where no layer would be left for SparseK.
    """
    chosen = set()
    for index in sparsek.dense_layers:
        if not -num_layers <= index < num_layers:
            raise ValueError(
                f"dense_layers={sparsek.dense_layers}: no layer {index} in a model of {num_layers} layers"
            )
        chosen.add(index % num_layers)
    if sparsek.dense_every is not None:
        chosen.update(range(sparsek.dense_every - 1, num_layers, sparsek.dense_every))
    if len(chosen) == num_layers:
        raise ValueError(
            f"dense_layers={sparsek.dense_layers}, dense_every={sparsek.dense_every}: every one of the "
            f"{num_layers} layers would be dense; leave one for SparseK or use the stock spec"
        )
    return frozenset(chosen)


def has_pattern(sparsek: SparseKConfig) -> bool:
    """Whether any layer may be dense."""
    return bool(sparsek.dense_layers) or sparsek.dense_every is not None


class PatternedSelfAttention:
    """Builds the dense or the SparseK self attention, as the layer's global number says.

    For the self_attention slot of one `ModuleSpec` that serves every layer: Megatron passes the global,
    1-based `layer_number` whichever pipeline or virtual stage builds the layer, so the pattern needs no
    knowledge of the split. Layers past the decoder (multi-token prediction) follow the last decoder layer.

    Raises NotImplementedError for multi-token prediction on megatron-core versions that number those layers
    from 1.
    """

    def __new__(
        cls,
        config: TransformerConfig,
        layer_number: int,
        *args: Any,
        dense: ModuleSpec,
        sparse: ModuleSpec,
        sparsek: SparseKConfig | None,
        **kwargs: Any,
    ) -> Any:
        kwargs.pop("attn_mask_type", None)
        sparsek = sparsek or settings_from_environment()[0]
        if has_pattern(sparsek) and config.mtp_num_layers and compat.mtp_layers_numbered_from_one():
            raise NotImplementedError(
                f"dense_layers={sparsek.dense_layers}, dense_every={sparsek.dense_every} with "
                "--mtp-num-layers: a single layer spec cannot tell those layers apart on this "
                "megatron-core; use get_sparsek_block_spec"
            )
        dense_layers = dense_indices(sparsek, config.num_layers)
        if dense_layers:
            compat.save_layers_under_their_own_keys(config)
        index = min(layer_number, config.num_layers) - 1
        if index not in dense_layers:
            spec = sparse
        elif sparse.params["before_config"]:
            refuse_missing_experts(config, sparse.params["layer_slots"])
            fused = sparse.params["fused_input_norm"]
            completed = complete_submodules(dense.submodules, config, fused_input_norm=fused)
            spec = dataclasses.replace(dense, submodules=completed)
        else:
            spec = dense
        return build_module(spec, *args, config=config, layer_number=layer_number, **kwargs)
