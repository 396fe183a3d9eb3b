# SPDX-License-Identifier: Apache-2.0
"""Specs: what sits in each slot, the objects and functions that `--spec` can name, and layer patterns."""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import te_stubs
import torch
from mcore_harness import batch, build_gpt, randomise, relative_errors, tiny_config
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer import TransformerConfig, transformer_block
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from sparsek_megatron import (
    Norm,
    SparseKConfig,
    SparseKCoreAttention,
    SparseKSelfAttention,
    compat,
    environment,
    get_sparsek_block_spec,
    get_sparsek_layer_spec,
    get_sparsek_mtp_block_spec,
    report,
)
from sparsek_megatron.layer_pattern import dense_indices
from sparsek_megatron.norm import QKNorm
from sparsek_megatron.specs import sparsek_spec

pytestmark = pytest.mark.usefixtures("megatron")

SPARSEK = SparseKConfig(topk=4, window=4, stride=4)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets SPARSEK_* for the test, past the cache of the process's environment."""

    def use(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(f"SPARSEK_{name}", value)
        environment.settings_from_environment.cache_clear()

    yield use
    monkeypatch.undo()
    environment.settings_from_environment.cache_clear()


def loss_of(model: torch.nn.Module, length: int = 32) -> torch.Tensor:
    tokens, positions, labels = batch(length)
    return model(tokens, positions, None, labels=labels).mean()


def kinds(model: Any) -> list[bool]:
    """Whether each layer has SparseK attention."""
    return [isinstance(layer.self_attention, SparseKSelfAttention) for layer in model.decoder.layers]


def test_the_object_named_by_spec_is_a_module_spec_and_builds_a_model_from_the_environment(
    settings: Any,
) -> None:
    settings(TOPK="6", WINDOW="10", STRIDE="2", REFERENCE_LENGTH="64")
    spec = import_module(("sparsek_megatron.specs", "sparsek_layer_spec"))
    assert isinstance(spec, ModuleSpec)
    model = build_gpt(tiny_config(), spec)
    attention = model.decoder.layers[0].self_attention
    assert attention.sparsek == attention.core_attention.sparsek
    assert (attention.sparsek.topk, attention.sparsek.window, attention.sparsek.pool) == (6, 10, 24)
    loss_of(model).backward()


def test_a_bad_environment_stops_the_model_and_not_the_import(settings: Any) -> None:
    settings(TOPKK="6")
    spec = import_module(("sparsek_megatron.specs", "sparsek_layer_spec"))
    with pytest.raises(ValueError, match="SPARSEK_TOPK"):
        build_gpt(tiny_config(), spec)


def test_settings_and_slots_are_printed_once(settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    report._reported.clear()
    settings(TOPK="6")
    spec = import_module(("sparsek_megatron.specs", "sparsek_layer_spec"))
    for _ in range(2):
        build_gpt(tiny_config(), spec)
    printed = capsys.readouterr().out
    assert printed.count("SparseK attention (settings: SPARSEK_TOPK)") == 1
    for words in ("topk=6", "pool=24", "L_ref=131072", "core_attention=SparseKCoreAttention", "mlp=MLP",
                  "linear_qkv=ColumnParallelLinear", "input_layernorm=Norm", "scorer=ScoringNetwork"):  # fmt: skip
        assert words in printed, words


def test_the_object_fills_qk_norms_from_the_configuration_and_refuses_experts(settings: Any) -> None:
    settings(DENSE_LAYERS="0")
    spec = import_module(("sparsek_megatron.specs", "sparsek_layer_spec"))
    model = build_gpt(tiny_config(qk_layernorm=True), spec)
    assert kinds(model) == [False, True]
    for layer in model.decoder.layers:
        assert isinstance(layer.self_attention.q_layernorm, QKNorm)
    l2 = build_gpt(tiny_config(qk_l2_norm=True), spec)
    assert all(isinstance(layer.self_attention.k_layernorm, L2Norm) for layer in l2.decoder.layers)
    with pytest.raises(NotImplementedError, match=r"--num-experts 2.*sparsek_spec"):
        build_gpt(tiny_config(num_moe_experts=2), spec)


@pytest.mark.parametrize("call", ["(config)", "(config, vp_stage)", "(args, config, vp_stage)", "keywords"])
def test_the_function_takes_every_loaders_arguments(call: str, settings: Any) -> None:
    settings(TOPK="6", DENSE_LAYERS="-1")
    config = tiny_config(num_moe_experts=2, moe_layer_freq=[0, 1])
    args = SimpleNamespace(spec=["sparsek_megatron.specs", "sparsek_spec"])
    spec = {
        "(config)": lambda: sparsek_spec(config),
        "(config, vp_stage)": lambda: sparsek_spec(config, None),
        "(args, config, vp_stage)": lambda: sparsek_spec(args, config, None),
        "keywords": lambda: sparsek_spec(config=config, vp_stage=None),
    }[call]()
    assert isinstance(spec, TransformerBlockSubmodules)
    model = build_gpt(config, spec)
    assert kinds(model) == [True, False]
    assert [type(layer.mlp).__name__ for layer in model.decoder.layers] == ["MLP", "MoELayer"]
    with pytest.raises(ValueError, match="TransformerConfig"):
        sparsek_spec(args)


class ModelConfigStandIn:
    """Like `GPTModelConfig`, with which Megatron-LM 0.19 calls the function: no TransformerConfig, but holding one as
    `transformer` and answering for its attributes.
    """

    def __init__(self, transformer: TransformerConfig) -> None:
        self.transformer = transformer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transformer, name)


def test_the_function_takes_the_model_config_of_megatron_lm_and_its_stage(settings: Any) -> None:
    """Layer 2 of 4 is the one that the second virtual stage of the first of two pipeline ranks builds."""
    settings(DENSE_LAYERS="2")
    config = tiny_config(num_layers=4, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    assert "vp_stage" in inspect.signature(sparsek_spec).parameters, "Megatron-LM asks before it passes one"
    for stage, module in ((0, SparseKSelfAttention), (1, SelfAttention)):
        layers: Any = sparsek_spec(ModelConfigStandIn(config), vp_stage=stage).layer_specs
        assert [layer.submodules.self_attention.module for layer in layers] == [module]
    assert config.hetereogenous_dist_checkpoint, "set on the configuration that the model is built from"


@pytest.mark.parametrize("make", [get_sparsek_layer_spec, get_sparsek_block_spec, sparsek_spec])
def test_settings_that_a_spec_took_from_the_environment_are_reported_so(make: Any, settings: Any, capfd: Any) -> None:
    settings(TOPK="5", WINDOW="4")
    config = tiny_config()
    report._reported.clear()
    build_gpt(config, make(config))
    assert "(settings: SPARSEK_TOPK, SPARSEK_WINDOW): topk=5 window=4" in capfd.readouterr().out
    if make is not sparsek_spec:
        given = environment.settings_from_environment()[0]
        build_gpt(config, make(config, sparsek=dataclasses.replace(given)))
        assert "(settings: code): topk=5 window=4" in capfd.readouterr().out


def test_every_norm_of_a_local_model_is_ours_and_shards_along_the_sequence() -> None:
    config = tiny_config(sequence_parallel=True, tensor_model_parallel_size=2)
    config.tensor_model_parallel_size = 1
    for spec in (
        get_sparsek_layer_spec(config, sparsek=SPARSEK),
        get_sparsek_block_spec(config, sparsek=SPARSEK),
    ):
        model = build_gpt(config, spec)
        norms = [model.decoder.final_layernorm]
        norms += [
            getattr(layer, n)
            for layer in model.decoder.layers
            for n in ("input_layernorm", "pre_mlp_layernorm")
        ]
        assert all(type(norm) is Norm and norm.reduce_weight_gradient for norm in norms)


def test_norms_of_prediction_layers_are_ours_where_the_stock_ones_refuse_sequence_parallelism() -> None:
    """WrappedTorchNorm asserts against the setting whatever the size of the group, so one rank shows it."""
    config = tiny_config(mtp_num_layers=1, sequence_parallel=True, tensor_model_parallel_size=2)
    config.tensor_model_parallel_size = 1
    spec = get_sparsek_block_spec(config, sparsek=SPARSEK)
    model = build_gpt(config, spec, mtp_block_spec=get_sparsek_mtp_block_spec(config, spec))
    layer = model.mtp.layers[0]
    assert all(type(norm) is Norm for norm in (layer.enorm, layer.hnorm, layer.final_layernorm))
    loss_of(model).backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert get_sparsek_mtp_block_spec(tiny_config(), spec) is None
    empty = TransformerBlockSubmodules(layer_specs=[], layer_norm=Norm)
    with pytest.raises(ValueError, match="spec has no decoder layer on this pipeline stage"):
        get_sparsek_mtp_block_spec(config, empty)


def test_one_layer_spec_refuses_a_model_of_dense_and_expert_layers() -> None:
    for frequency in (2, [0, 1]):
        config = tiny_config(num_moe_experts=2, moe_layer_freq=frequency)
        with pytest.raises(NotImplementedError, match=r"--moe-layer-freq .*get_sparsek_block_spec"):
            get_sparsek_layer_spec(config, sparsek=SPARSEK)
    config = tiny_config(num_moe_experts=2, moe_layer_freq=[1, 1])
    get_sparsek_layer_spec(config, sparsek=SPARSEK)
    get_sparsek_layer_spec(tiny_config(moe_layer_freq=2), sparsek=SPARSEK)


def test_a_stock_model_beside_ours_keeps_its_own_final_norm() -> None:
    """The final norm travels in our specs' metainfo; importing this package changes no other model."""
    config = tiny_config()
    stock = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm")
    before = type(build_gpt(config, stock).decoder.final_layernorm)
    ours = build_gpt(config, get_sparsek_layer_spec(config, sparsek=SPARSEK))
    assert type(ours.decoder.final_layernorm) is Norm
    assert type(build_gpt(config, stock).decoder.final_layernorm) is before
    assert before is not Norm
    compat.let_layer_specs_name_the_final_norm()
    assert not hasattr(transformer_block._get_block_submodules.__wrapped__, "__wrapped__"), "wrapped once"


def test_stock_fields_arrive_unchanged() -> None:
    stock = gpt_layer_specs.get_gpt_layer_local_spec(num_experts=4, qk_layernorm=True)
    ours = get_sparsek_layer_spec(sparsek=SPARSEK, num_experts=4, qk_layernorm=True)
    assert ours.module is stock.module
    for name in ("self_attn_bda", "mlp_bda", "sharded_state_dict_keys_map", "cross_attention"):
        assert getattr(ours.submodules, name) == getattr(stock.submodules, name)
    assert type(ours.submodules.mlp) is type(stock.submodules.mlp)
    attention, stock_attention = ours.submodules.self_attention, stock.submodules.self_attention
    assert attention.submodules.linear_qkv is stock_attention.submodules.linear_qkv
    assert attention.submodules.linear_proj is stock_attention.submodules.linear_proj
    assert attention.params["attn_mask_type"] == stock_attention.params["attn_mask_type"]
    assert attention.submodules.core_attention.module is SparseKCoreAttention


@pytest.mark.parametrize(
    ("settings", "layers", "dense"),
    [
        ({"dense_layers": (0, -1)}, 6, {0, 5}),
        ({"dense_every": 3}, 6, {2, 5}),
        ({"dense_layers": (0,), "dense_every": 2}, 4, {0, 1, 3}),
        ({}, 4, set()),
    ],
)
def test_dense_layers_are_global_indices(settings: dict[str, Any], layers: int, dense: set[int]) -> None:
    assert dense_indices(SparseKConfig(**settings), layers) == dense


def test_patterns_outside_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match="no layer 6 in a model of 6 layers"):
        dense_indices(SparseKConfig(dense_layers=(6,)), 6)
    with pytest.raises(ValueError, match="every one of the 2 layers"):
        get_sparsek_layer_spec(tiny_config(), sparsek=SparseKConfig(dense_every=1))


@pytest.mark.parametrize("maker", [get_sparsek_layer_spec, get_sparsek_block_spec])
def test_a_pattern_mixes_dense_and_sparsek_layers_in_one_model(maker: Any) -> None:
    sparsek = SparseKConfig(topk=4, window=4, stride=4, dense_layers=(0, -1))
    config = tiny_config(num_layers=4)
    model = build_gpt(config, maker(config, sparsek=sparsek))
    assert kinds(model) == [False, True, True, False]
    assert type(model.decoder.layers[0].self_attention) is SelfAttention
    loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_multi_token_prediction_follows_the_last_layer() -> None:
    config = tiny_config(mtp_num_layers=1)
    for dense_layers, sparse in (((0,), True), ((-1,), False)):
        sparsek = SparseKConfig(topk=4, window=4, stride=4, dense_layers=dense_layers)
        block = get_sparsek_block_spec(config, sparsek=sparsek)
        mtp = get_sparsek_mtp_block_spec(config, block)
        model = build_gpt(config, block, mtp_block_spec=mtp)
        layer = model.mtp.layers[0]
        inner = getattr(layer, "transformer_layer", None) or layer.mtp_model_layer
        assert isinstance(inner.self_attention, SparseKSelfAttention) == sparse
        loss_of(model).backward()
        assert all(p.grad is not None for p in inner.parameters())


def test_a_pattern_in_a_single_spec_is_refused_where_prediction_layers_cannot_be_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compat, "mtp_layers_numbered_from_one", lambda: True)
    config = tiny_config(mtp_num_layers=1)
    spec = get_sparsek_layer_spec(config, sparsek=SparseKConfig(topk=4, window=4, dense_layers=(0,)))
    with pytest.raises(NotImplementedError, match=r"--mtp-num-layers.*get_sparsek_block_spec"):
        build_gpt(config, spec)


def test_the_te_spec_gives_the_scorer_its_own_norm_and_equals_the_dense_te_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    te_stubs.install(monkeypatch)
    config = tiny_config(params_dtype=torch.float64, qk_layernorm=True)
    sparsek = SparseKConfig(topk=20, window=16, stride=4, pool=40)
    spec = get_sparsek_layer_spec(config, sparsek=sparsek)
    names = spec.submodules.self_attention.submodules
    assert names.linear_qkv is te_stubs.StubTELayerNormColumnParallelLinear
    assert names.linear_proj is te_stubs.StubTERowParallelLinear
    assert names.q_layernorm is te_stubs.StubTENorm
    assert names.core_attention.module is SparseKCoreAttention
    sparse = build_gpt(config, spec)
    stock = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
    dense = build_gpt(config, stock)
    randomise(dense)
    loaded = sparse.load_state_dict(dense.state_dict(), strict=False)
    assert {key.split("scorer.")[1] for key in loaded.missing_keys} == {
        "weight",
        "slope",
        "reference_length",
        "norm.weight",
    }
    losses = [loss_of(model) for model in (dense, sparse)]
    for loss in losses:
        loss.backward()
    assert abs(float(losses[0] - losses[1])) <= 1e-6
    wanted = {name: p.grad for name, p in dense.named_parameters()}
    got = {name: p.grad for name, p in sparse.named_parameters() if name in wanted}
    assert max(relative_errors(got, wanted).values()) <= 1e-5  # pyright: ignore[reportArgumentType]


def test_the_object_under_te_fills_slots_and_asks_for_te_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="transformer_engine"):
        get_sparsek_layer_spec(transformer_impl="transformer_engine")
    with pytest.raises(ValueError, match="transformer_impl='apex'"):
        get_sparsek_layer_spec(transformer_impl="apex")
    te_stubs.install(monkeypatch)
    model = build_gpt(tiny_config(qk_layernorm=True), get_sparsek_layer_spec(sparsek=SPARSEK))
    attention = model.decoder.layers[0].self_attention
    assert isinstance(attention.q_layernorm, te_stubs.StubTENorm)
    assert isinstance(attention.scorer.norm, Norm)
    local = get_sparsek_layer_spec(tiny_config(transformer_impl="local"), sparsek=SPARSEK)
    assert not local.submodules.self_attention.params["fused_input_norm"]


def test_the_pool_overflow_warning_fires_where_scores_are_too_close() -> None:
    close = SparseKConfig(topk=4, window=4, stride=4, pool=6, score_spread=1e-3, initial_slope=0.0, overflow_interval=1)
    config = tiny_config()
    with pytest.warns(UserWarning, match=r"pool of 6 overflows .* score_spread"):
        loss_of(build_gpt(config, get_sparsek_layer_spec(config, sparsek=close)))
