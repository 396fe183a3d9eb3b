# SPDX-License-Identifier: Apache-2.0
"""Layer specs: Megatron's stock specs with the attention slots replaced.

Every spec here is made by calling megatron-core's own spec function and replacing fields of what it returns,
so that whatever a version adds to a layer arrives unchanged.

    get_sparsek_layer_spec      one ModuleSpec for every layer
    get_sparsek_block_spec      the layers of this pipeline stage, MoE pattern and final norm included
    get_sparsek_mtp_block_spec  the multi-token prediction layers behind them
    sparsek_layer_spec          an object for `--spec sparsek_megatron.specs sparsek_layer_spec`
    sparsek_spec                a function for loaders that call what `--spec` names

Settings that are None come from the environment (`sparsek_megatron.environment`).
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from sparsek_megatron import compat, refuse
from sparsek_megatron.attention import SparseKSelfAttention
from sparsek_megatron.config import SparseKConfig
from sparsek_megatron.core_attention import SparseKCoreAttention
from sparsek_megatron.environment import settings_from_environment
from sparsek_megatron.layer_pattern import PatternedSelfAttention, dense_indices, has_pattern
from sparsek_megatron.norm import Norm, QKNorm

IMPLEMENTATIONS = ("local", "transformer_engine")
# Arguments of the stock spec functions whose field in the configuration has another name.
CONFIG_FIELDS = {"num_experts": "num_moe_experts", "use_te_op_fuser": "use_transformer_engine_op_fuser"}
LAYER_NORMS = ("input_layernorm", "pre_cross_attn_layernorm", "pre_mlp_layernorm")
PREDICTION_NORMS = ("enorm", "hnorm", "layer_norm")


def resolve_implementation(implementation: str | None, config: TransformerConfig | None = None) -> str:
    """ "local" or "transformer_engine": the argument, else the config's transformer_impl, else TE if installed.

    A config's "transformer_engine" (megatron-core's default) means "local" where TE is not installed.
    Raises ValueError for another name, and where Transformer Engine is asked for by argument and missing.
    """
    if implementation is None:
        asked = getattr(config, "transformer_impl", "transformer_engine")
        if asked == "inference_optimized":
            raise NotImplementedError(
                "--transformer-impl inference_optimized: train with local or transformer_engine"
            )
        return asked if compat.have_transformer_engine() else "local"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"transformer_impl={implementation!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "transformer_engine" and not compat.have_transformer_engine():
        raise ValueError("transformer_impl='transformer_engine': it is not installed; use 'local'")
    return implementation


def slot_name(slot: Any) -> str:
    """Name of the class in a slot of a spec: a class, a ModuleSpec, a partial or a function."""
    inner = getattr(slot, "module", None) or getattr(slot, "func", None) or slot
    return getattr(inner, "__qualname__", type(inner).__name__)


def _with_our_norms(layer: Any) -> Any:
    """Our norm in every norm slot of a local layer's submodules."""
    present = [name for name in LAYER_NORMS if getattr(layer, name, IdentityOp) is not IdentityOp]
    return dataclasses.replace(layer, **dict.fromkeys(present, Norm))


def _with_our_qk_norms(attention: Any) -> Any:
    """Our q/k norms in the slots of a local `SelfAttention` spec that hold a plain norm."""
    replaced = {
        name: QKNorm
        for name in ("q_layernorm", "k_layernorm")
        if compat.is_plain_norm(getattr(attention.submodules, name))
    }
    return dataclasses.replace(attention, submodules=dataclasses.replace(attention.submodules, **replaced))


def _sparsek_attention(
    stock: Any, sparsek: SparseKConfig | None, *, local: bool, before_config: bool, slots: dict[str, str]
) -> ModuleSpec:
    """A stock `SelfAttention` spec with SparseK in the module and core attention slots."""
    core: Any = ModuleSpec(module=SparseKCoreAttention, params={"sparsek": sparsek})
    return dataclasses.replace(
        stock,
        module=SparseKSelfAttention,
        params={
            **stock.params,
            "sparsek": sparsek,
            "fused_input_norm": not local,
            "before_config": before_config,
            "layer_slots": slots,
        },
        submodules=dataclasses.replace(stock.submodules, core_attention=core),
    )


def to_sparsek(
    layer: Any,
    sparsek: SparseKConfig | None,
    *,
    local: bool,
    dense: bool | None = None,
    before_config: bool = False,
) -> Any:
    """A stock transformer layer spec with SparseK attention, and with our norms where `local`.

    dense: True keeps the stock attention, False replaces it, None decides by `sparsek`'s layer pattern when
    the layer is built. before_config: the stock spec was made without the model's configuration, so that
    slots which depend on it are filled when the layer is built.
    """
    submodules = _with_our_norms(layer.submodules) if local else layer.submodules
    stock = submodules.self_attention
    if local:
        stock = _with_our_qk_norms(stock)
    slots = {
        name: slot_name(getattr(submodules, name)) for name in ("input_layernorm", "pre_mlp_layernorm", "mlp")
    }
    attention = _sparsek_attention(stock, sparsek, local=local, before_config=before_config, slots=slots)
    if dense:
        attention = stock
    elif dense is None and (sparsek is None or has_pattern(sparsek)):
        attention = ModuleSpec(
            module=PatternedSelfAttention,  # pyright: ignore[reportArgumentType]
            params={**stock.params, "dense": stock, "sparse": attention, "sparsek": sparsek},
        )
    return dataclasses.replace(layer, submodules=dataclasses.replace(submodules, self_attention=attention))


def _stock_layer(config: TransformerConfig | None, *, local: bool, **keywords: Any) -> Any:
    """The stock layer spec, with every argument it takes filled from `config` unless given."""
    stock: Any = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec
    if local:
        stock = gpt_layer_specs.get_gpt_layer_local_spec
    accepted = inspect.signature(stock).parameters
    for name in accepted.keys() - keywords.keys() - {"fp8"}:  # fp8 is deprecated there and warns
        field = CONFIG_FIELDS.get(name, name)
        if hasattr(config, field):
            keywords[name] = getattr(config, field)
    return stock(**keywords)


def get_sparsek_layer_spec(
    config: TransformerConfig | None = None,
    *,
    sparsek: SparseKConfig | None = None,
    transformer_impl: str | None = None,
    **stock: Any,
) -> ModuleSpec:
    """Spec of a transformer layer with SparseK attention, for `GPTModel(transformer_layer_spec=...)`.

    config: the model's configuration, which fills what depends on it (MoE, q/k norms) and is checked;
    without it those slots are filled when a layer is built, and MoE needs `num_experts=`. sparsek: the
    settings; None reads the environment. transformer_impl: "local" or "transformer_engine". Further keywords
    go to megatron-core's stock spec function and win over the configuration.

    A layer pattern in `sparsek` is applied by global layer number, under any pipeline split. A local spec names
    `sparsek_megatron.Norm` as the model's final norm in its `metainfo`, since the stock one refuses sequence
    parallelism (`compat.let_layer_specs_name_the_final_norm`); models made from other specs keep theirs.

    Raises NotImplementedError for a configuration that SparseK attention does not support, naming the flag.
    """
    local = resolve_implementation(transformer_impl, config) == "local"
    if config is not None:
        refuse.check_model_config(config)
        if "num_experts" not in stock:
            refuse.check_every_layer_has_experts(config)
        sparsek = sparsek or settings_from_environment()[0]
        dense_indices(sparsek, config.num_layers)
    layer = _stock_layer(config, local=local, **stock)
    spec = to_sparsek(
        layer, sparsek, local=local, before_config=config is None and "num_experts" not in stock
    )
    if not local:
        return spec
    compat.let_layer_specs_name_the_final_norm()
    return dataclasses.replace(spec, metainfo={**spec.metainfo, compat.FINAL_NORM: Norm})


def get_sparsek_block_spec(
    config: TransformerConfig,
    *,
    sparsek: SparseKConfig | None = None,
    transformer_impl: str | None = None,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """Specs of this pipeline stage's layers and of the final norm, for GPTModel's `transformer_layer_spec`.

    As `get_sparsek_layer_spec`, with the MoE pattern of `config.moe_layer_freq`; the local backend has
    `sparsek_megatron.Norm` in every norm slot. pp_rank None means this rank's.
    """
    refuse.check_model_config(config)
    sparsek = sparsek or settings_from_environment()[0]
    local = resolve_implementation(transformer_impl, config) == "local"
    block = gpt_layer_specs.get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=not local,
        normalization=config.normalization,
        qk_l2_norm=getattr(config, "qk_l2_norm", False),
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    assert block.layer_specs is not None
    dense = dense_indices(sparsek, config.num_layers)
    if dense:
        compat.save_layers_under_their_own_keys(config)
    indices = compat.stage_layer_indices(config, vp_stage=vp_stage, pp_rank=pp_rank)
    layers = [
        to_sparsek(layer, sparsek, local=local, dense=index in dense)
        for index, layer in zip(indices, block.layer_specs, strict=True)
    ]
    norm: Any = Norm if local else block.layer_norm
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def get_sparsek_mtp_block_spec(
    config: TransformerConfig,
    spec: TransformerBlockSubmodules | ModuleSpec,
    *,
    transformer_impl: str | None = None,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> MultiTokenPredictionBlockSubmodules | None:
    """Specs of this pipeline stage's multi-token prediction layers, for GPTModel's `mtp_block_spec`; None without any.

    spec: the model's own, from `get_sparsek_block_spec` or `get_sparsek_layer_spec`, whose last layer these layers
    contain. megatron-core's `get_gpt_mtp_block_spec`, with `sparsek_megatron.Norm` in the norm slots of the local
    backend: the stock ones refuse sequence parallelism. transformer_impl and pp_rank as there.

    Raises ValueError where this stage has prediction layers and `spec` no layer.
    """
    local = resolve_implementation(transformer_impl, config) == "local"
    try:
        block: Any = gpt_layer_specs.get_gpt_mtp_block_spec(
            config, spec, use_transformer_engine=not local, vp_stage=vp_stage, pp_rank=pp_rank
        )
    except IndexError:  # it takes the last of none
        raise ValueError(
            "get_sparsek_mtp_block_spec: spec has no decoder layer on this pipeline stage for its prediction layers "
            "to be like; pass get_sparsek_layer_spec(config), or place a decoder layer there"
        ) from None
    if block is None or not local:
        return block
    layers = [
        dataclasses.replace(
            layer, submodules=dataclasses.replace(layer.submodules, **dict.fromkeys(PREDICTION_NORMS, Norm))
        )
        for layer in block.layer_specs
    ]
    return dataclasses.replace(block, layer_specs=layers)


def sparsek_spec(*args: Any, vp_stage: int | None = None, **keywords: Any) -> TransformerBlockSubmodules:
    """Block spec for loaders that call what `--spec` names.

    Accepts `(config)`, `(config, vp_stage)` and `(args, config, vp_stage)`, positionally or by keyword: the
    conventions of Megatron-LM with megatron-core 0.19 and of slime. Megatron-LM's config is its `GPTModelConfig`,
    which is no TransformerConfig and holds one as `transformer`. Settings come from the environment.
    """
    given = (getattr(arg, "transformer", arg) for arg in (*args, *keywords.values()))
    found = [arg for arg in given if isinstance(arg, TransformerConfig)]
    if not found:
        raise ValueError(
            "sparsek_spec: no TransformerConfig among the arguments; call sparsek_spec(config, vp_stage)"
        )
    if args and isinstance(args[-1], int):
        vp_stage = args[-1]
    return get_sparsek_block_spec(found[0], vp_stage=vp_stage)


sparsek_layer_spec = get_sparsek_layer_spec()
sparsek_local_layer_spec = get_sparsek_layer_spec(transformer_impl="local")
