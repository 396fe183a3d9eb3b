# SPDX-License-Identifier: Apache-2.0
"""With topk + window covering the sequence, a SparseK GPT is the stock dense GPT of the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mcore_harness import batch, build_gpt, packed, randomise, relative_errors, tiny_config
from megatron.core.models.gpt import gpt_layer_specs

from sparsek_megatron import SparseKConfig, get_sparsek_block_spec, get_sparsek_layer_spec

pytestmark = pytest.mark.usefixtures("megatron")

COVERING = {"topk": 40, "window": 24, "stride": 8, "pool": 80}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def run(
    model: torch.nn.Module, packed_seq_params: Any = None, length: int = 64, size: int = 2
) -> torch.Tensor:
    tokens, positions, labels = batch(length, size)
    loss = model(tokens, positions, None, labels=labels, packed_seq_params=packed_seq_params).mean()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("gate", ["key_value", "value", "logit"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalization": "LayerNorm", "add_bias_linear": True, "add_qkv_bias": True},
        {"qk_layernorm": True, "layernorm_epsilon": 1e-6},
        {"qk_l2_norm": True},
        {"attention_output_gate": True},
        {"softmax_scale": 0.2, "num_query_groups": 4},
        {"num_moe_experts": 2, "moe_layer_freq": [0, 1], "moe_router_load_balancing_type": "none"},
    ],
    ids=["rmsnorm", "layernorm-bias", "qk-norm", "qk-l2-norm", "output-gate", "softmax-scale-mha", "moe"],
)
def test_loss_and_every_gradient_equal_the_stock_dense_model(changes: dict[str, Any], gate: str) -> None:
    config = tiny_config(params_dtype=torch.float64, **changes)
    stock = gpt_layer_specs.get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=False,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )
    dense = build_gpt(config, stock).double()
    sparse = build_gpt(config, get_sparsek_block_spec(config, sparsek=SparseKConfig(gate=gate, **COVERING)))
    randomise(dense)
    loaded = sparse.load_state_dict(dense.state_dict(), strict=False)
    assert all("scorer" in key for key in loaded.missing_keys) and not loaded.unexpected_keys
    dense_loss, loss = run(dense), run(sparse)
    assert abs(float(loss - dense_loss)) <= 1e-6
    wanted = gradients(dense)
    got = gradients(sparse)
    scorer = {name: got.pop(name) for name in list(got) if "scorer" in name}
    assert len(scorer) == 4 and all(not g.any() for g in scorer.values()), "gates are all 1: zero, never None"
    errors = relative_errors(got, wanted)
    assert max(errors.values()) <= 1e-5, errors


def test_a_narrower_selection_is_not_dense() -> None:
    """The comparison above can fail: with topk + window below the sequence length the losses differ."""
    config = tiny_config(params_dtype=torch.float64)
    sparsek = SparseKConfig(topk=4, window=4, stride=4)
    sparse = build_gpt(config, get_sparsek_layer_spec(config, sparsek=sparsek))
    dense = build_gpt(config, get_sparsek_layer_spec(config, sparsek=SparseKConfig(**COVERING)))
    dense.load_state_dict(sparse.state_dict())
    assert abs(float(run(sparse) - run(dense))) > 1e-4
    assert all(g.any() for name, g in gradients(sparse).items() if "scorer" in name)


@pytest.mark.parametrize("padded", [None, [24, 8, 40]])
def test_packed_sequences_equal_each_sequence_alone(padded: list[int] | None) -> None:
    lengths = [23, 1, 40]
    config = tiny_config(params_dtype=torch.float64)
    sparsek = SparseKConfig(topk=6, window=5, stride=4, pool=14, reference_length=64)
    model = build_gpt(config, get_sparsek_layer_spec(config, sparsek=sparsek))
    randomise(model)
    spans = padded or lengths
    tokens, positions, labels = batch(sum(spans), 1)

    def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum")

    alone, start = [], 0
    for length, span in zip(lengths, spans, strict=True):
        part = slice(start, start + length)
        alone.append(model(tokens[:, part], positions[:, :length], None))
        loss_of(alone[-1], labels[:, part]).backward()
        start += span
    wanted = {name: g.clone() for name, g in gradients(model).items()}
    model.zero_grad()
    together = model(tokens, positions, None, packed_seq_params=packed(lengths, padded))
    pieces = [x[:, :length] for x, length in zip(together.split(spans, 1), lengths, strict=True)]
    for got, want in zip(pieces, alone, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    real = [x[:, :length] for x, length in zip(labels.split(spans, 1), lengths, strict=True)]
    loss_of(torch.cat(pieces, 1), torch.cat(real, 1)).backward()
    errors = relative_errors(gradients(model), wanted)
    assert max(errors.values()) <= 1e-9, errors
