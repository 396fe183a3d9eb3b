# SPDX-License-Identifier: Apache-2.0
"""Layer specs: Megatron's stock specs with the attention slots replaced.

Every spec here is made by calling megatron-core's own spec function and replacing fields of what it returns,
so that whatever a version adds to a layer arrives unchanged.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from sparsek_megatron import compat, refuse
from sparsek_megatron.attention import SparseKCoreAttention, SparseKSelfAttention
from sparsek_megatron.config import SparseKConfig
from sparsek_megatron.norm import Norm, QKNorm

IMPLEMENTATIONS = ("local", "transformer_engine")


def resolve_implementation(implementation: str | None, config: TransformerConfig | None) -> str:
    """ "local" or "transformer_engine": the argument, else the config's transformer_impl, else TE where
    installed.

    Raises ValueError for another name, and where Transformer Engine is asked for and missing.
    """
    if implementation is None:
        asked = getattr(config, "transformer_impl", None)
        available = compat.have_transformer_engine()
        return "transformer_engine" if available and asked in (None, "transformer_engine") else "local"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"transformer_impl={implementation!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "transformer_engine" and not compat.have_transformer_engine():
        raise ValueError("transformer_impl='transformer_engine': it is not installed; use 'local'")
    return implementation


def _replace_norms(layer: Any) -> Any:
    """Our norm in every norm slot of a local layer's submodules (a `TransformerLayerSubmodules`)."""
    replaced = {
        name: Norm
        for name in ("input_layernorm", "pre_cross_attn_layernorm", "pre_mlp_layernorm")
        if getattr(layer, name, IdentityOp) is not IdentityOp
    }
    return dataclasses.replace(layer, **replaced)


def _sparsek_attention(stock: Any, sparsek: SparseKConfig, *, local: bool) -> ModuleSpec:
    """A stock `SelfAttention` spec with SparseK in the module and core attention slots."""
    replaced: dict[str, Any] = {
        "core_attention": ModuleSpec(module=SparseKCoreAttention, params={"sparsek": sparsek})
    }
    if local:
        for name in ("q_layernorm", "k_layernorm"):
            if compat.is_plain_norm(getattr(stock.submodules, name)):
                replaced[name] = QKNorm
    return ModuleSpec(
        module=SparseKSelfAttention,
        params={**stock.params, "sparsek": sparsek, "fused_input_norm": not local},
        submodules=dataclasses.replace(stock.submodules, **replaced),
        metainfo=copy.copy(stock.metainfo),
    )


def to_sparsek(layer: Any, sparsek: SparseKConfig, *, local: bool) -> ModuleSpec:
    """A stock transformer layer spec with SparseK attention, and with our norms where `local`."""
    submodules = dataclasses.replace(
        layer.submodules,
        self_attention=_sparsek_attention(layer.submodules.self_attention, sparsek, local=local),
    )
    if local:
        submodules = _replace_norms(submodules)
    return dataclasses.replace(layer, submodules=submodules)


def get_sparsek_layer_spec(
    config: TransformerConfig | None = None,
    *,
    sparsek: SparseKConfig | None = None,
    transformer_impl: str | None = None,
    num_experts: int | None = None,
    moe_grouped_gemm: bool | None = None,
    qk_layernorm: bool | None = None,
    normalization: str | None = None,
    **stock: Any,
) -> ModuleSpec:
    """Spec of a transformer layer with SparseK attention, for `GPTModel(transformer_layer_spec=...)`.

    config: the model's configuration, from which arguments left None are read. transformer_impl: "local" or
    "transformer_engine". Further keywords go to megatron-core's stock spec function. Raises
    NotImplementedError for configurations that SparseK attention does not support, naming the flag.
    """
    sparsek = sparsek or SparseKConfig()
    if config is not None:
        refuse.check_model_config(config)
    local = resolve_implementation(transformer_impl, config) == "local"

    def setting(value: Any, name: str, default: Any) -> Any:
        return value if value is not None else getattr(config, name, default)

    keywords = {
        "num_experts": setting(num_experts, "num_moe_experts", None),
        "moe_grouped_gemm": setting(moe_grouped_gemm, "moe_grouped_gemm", False),
        "qk_layernorm": setting(qk_layernorm, "qk_layernorm", False),
        **stock,
    }
    if local:
        compat.replace_stock_torch_norm(Norm)
        keywords["normalization"] = setting(normalization, "normalization", "LayerNorm")
        layer = gpt_layer_specs.get_gpt_layer_local_spec(**keywords)
    else:
        layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(**keywords)
    return to_sparsek(layer, sparsek, local=local)


def get_sparsek_block_spec(
    config: TransformerConfig,
    *,
    sparsek: SparseKConfig | None = None,
    transformer_impl: str | None = None,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """Specs of the layers of this pipeline stage and of the final norm, for
    `GPTModel(transformer_layer_spec=...)`.

    As `get_sparsek_layer_spec`, and with the MoE pattern of `config.moe_layer_freq`.
    """
    sparsek = sparsek or SparseKConfig()
    refuse.check_model_config(config)
    local = resolve_implementation(transformer_impl, config) == "local"
    block = gpt_layer_specs.get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=not local,
        normalization=config.normalization,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    assert block.layer_specs is not None
    layers = [to_sparsek(layer, sparsek, local=local) for layer in block.layer_specs]
    norm: Any = Norm if local else block.layer_norm
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


sparsek_layer_spec = get_sparsek_layer_spec()
