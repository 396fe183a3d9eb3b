# SPDX-License-Identifier: Apache-2.0
"""The hybrid stack of megatron-core 0.19, assembled against stub TE classes; refused by name on older versions."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
from typing import Any

import pytest
import te_stubs
import torch
from mcore_harness import VOCAB, batch, tiny_config

from sparsek_megatron import SparseKConfig, SparseKSelfAttention, compat

pytestmark = pytest.mark.usefixtures("megatron")

HAVE_HYBRID = compat.version_tuple(compat.MCORE_VERSION) >= (0, 19, 0)
needs_hybrid = pytest.mark.skipif(not HAVE_HYBRID, reason="HybridModel arrived after megatron-core 0.16")


@pytest.mark.skipif(HAVE_HYBRID, reason="this megatron-core has HybridModel")
def test_a_version_without_hybrid_models_is_named() -> None:
    sys.modules.pop("sparsek_megatron.hybrid", None)
    with pytest.raises(NotImplementedError, match=r"has no HybridModel.*get_sparsek_layer_spec"):
        importlib.import_module("sparsek_megatron.hybrid")


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stock stack spec with stubs where TE's classes would be."""
    from megatron.core.models.hybrid import hybrid_block, hybrid_layer_specs

    te_stubs.install(monkeypatch)
    stock: Any = hybrid_layer_specs.hybrid_stack_spec
    attention = stock.submodules.attention_layer
    slots = dataclasses.replace(
        attention.submodules.self_attention.submodules,
        linear_qkv=te_stubs.StubTELayerNormColumnParallelLinear,
        core_attention=te_stubs.StubTEDotProductAttention,
        linear_proj=te_stubs.StubTERowParallelLinear,
    )
    self_attention = dataclasses.replace(attention.submodules.self_attention, submodules=slots)
    mlp = stock.submodules.mlp_layer
    stubs = dataclasses.replace(
        mlp.submodules.mlp.keywords["submodules"],
        linear_fc1=te_stubs.StubTELayerNormColumnParallelLinear,
        linear_fc2=te_stubs.StubTERowParallelLinear,
    )
    built = functools.partial(mlp.submodules.mlp.func, submodules=stubs)
    stack = dataclasses.replace(
        stock.submodules,
        attention_layer=dataclasses.replace(
            attention, submodules=dataclasses.replace(attention.submodules, self_attention=self_attention)
        ),
        mlp_layer=dataclasses.replace(mlp, submodules=dataclasses.replace(mlp.submodules, mlp=built)),
    )
    stubbed = dataclasses.replace(stock, submodules=stack)
    monkeypatch.setattr(hybrid_layer_specs, "hybrid_stack_spec", stubbed)
    monkeypatch.setattr(hybrid_block, "TENorm", te_stubs.StubTENorm)
    return stubbed


def hybrid_model(config: Any, spec: Any) -> Any:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    return HybridModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=64,
        hybrid_layer_pattern="*-*-",
        position_embedding_type="rope",
    )


def step(model: Any) -> torch.Tensor:
    tokens, positions, labels = batch(32)
    loss = model(tokens, positions, None, labels=labels).mean()
    loss.backward()
    return loss.detach()


@needs_hybrid
def test_attention_layers_are_sparsek_and_a_covering_selection_is_the_stock_model(stubbed: Any) -> None:
    from sparsek_megatron.hybrid import get_sparsek_hybrid_stack_spec

    config = tiny_config(num_layers=4, params_dtype=torch.float64)
    sparsek = SparseKConfig(topk=20, window=16, stride=4, pool=40)
    spec: Any = get_sparsek_hybrid_stack_spec(config, sparsek=sparsek)
    for slot in ("mamba_layer", "mlp_layer", "moe_layer", "mtp_block_spec", "gdn_layer"):
        assert getattr(spec.submodules, slot) is getattr(stubbed.submodules, slot)
    sparse, dense = hybrid_model(config, spec), hybrid_model(config, stubbed)
    kinds = [
        isinstance(getattr(layer, "self_attention", None), SparseKSelfAttention)
        for layer in sparse.decoder.layers
    ]
    assert kinds == [True, False, True, False]
    assert sparse.decoder.layers[0].self_attention.scorer.norm is not None
    sparse.load_state_dict(dense.state_dict(), strict=False)
    assert abs(float(step(sparse) - step(dense))) <= 1e-6
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(
            dict(sparse.named_parameters())[name].grad, parameter.grad, rtol=1e-5, atol=1e-9
        )


@needs_hybrid
def test_patterns_count_all_layers_and_experts_stay_in_their_own_slot(stubbed: Any) -> None:
    from sparsek_megatron.hybrid import get_sparsek_hybrid_stack_spec

    config = tiny_config(num_layers=4, num_moe_experts=2)
    spec = get_sparsek_hybrid_stack_spec(config, sparsek=SparseKConfig(topk=4, window=4, dense_layers=(0,)))
    model = hybrid_model(config, spec)
    kinds = [
        isinstance(getattr(layer, "self_attention", None), SparseKSelfAttention)
        for layer in model.decoder.layers
    ]
    assert kinds == [False, False, True, False]


@needs_hybrid
def test_a_missing_transformer_engine_is_named() -> None:
    from sparsek_megatron.hybrid import get_sparsek_hybrid_stack_spec

    with pytest.raises(ValueError, match=r"Transformer Engine.*get_sparsek_layer_spec"):
        get_sparsek_hybrid_stack_spec(tiny_config(), sparsek=SparseKConfig())
