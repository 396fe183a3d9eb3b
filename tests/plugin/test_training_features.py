# SPDX-License-Identifier: Apache-2.0
"""Recompute, precision and determinism of SparseK layers inside a GPT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mcore_harness import batch, build_gpt, tiny_config
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from sparsek_megatron import SparseKConfig, get_sparsek_layer_spec

pytestmark = pytest.mark.usefixtures("megatron")

SPARSEK = SparseKConfig(topk=6, window=5, stride=4, pool=14, reference_length=64, initial_slope=1.0)
LOSS_SCALE = 256.0


def train_once(weights: dict[str, Any] | None = None, **changes: Any) -> tuple[dict, torch.Tensor, dict]:
    """State dict, loss and gradients of one training step's forward and backward."""
    torch.manual_seed(3)
    config = tiny_config(**changes)
    model = build_gpt(config, get_sparsek_layer_spec(config, sparsek=SPARSEK))
    if weights is not None:
        model.load_state_dict(weights)
    tokens, positions, labels = batch()
    model_parallel_cuda_manual_seed(3)
    torch.manual_seed(3)
    loss = model(tokens, positions, None, labels=labels).float().mean()
    (LOSS_SCALE * loss).backward()
    return model.state_dict(), loss.detach(), {name: p.grad for name, p in model.named_parameters()}


RECOMPUTE = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    "core_attn": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "core_attn-and-mlp": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
}


@pytest.mark.parametrize("name", RECOMPUTE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_recompute_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    weights, loss, wanted = train_once(params_dtype=dtype, bf16=dtype == torch.bfloat16)
    _, again, got = train_once(weights, params_dtype=dtype, bf16=dtype == torch.bfloat16, **RECOMPUTE[name])
    assert torch.equal(loss, again)
    assert got.keys() == wanted.keys()
    for key in wanted:
        assert torch.equal(got[key], wanted[key]), key


@pytest.mark.parametrize("name", RECOMPUTE)
def test_recompute_repeats_dropout_masks(name: str) -> None:
    """Hidden dropout around SparseK layers: the recomputed forward draws the same masks."""
    weights, loss, wanted = train_once(hidden_dropout=0.2)
    _, again, got = train_once(weights, hidden_dropout=0.2, **RECOMPUTE[name])
    assert torch.equal(loss, again)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_follows_single_precision(dtype: torch.dtype) -> None:
    """Same rounded weights in both; the residual difference is activation rounding."""
    half = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    weights, loss, got = train_once(params_dtype=dtype, **half)
    _, wanted_loss, wanted = train_once(weights)
    assert abs(float(loss - wanted_loss)) < 0.02
    for key, gradient in got.items():
        assert gradient.dtype == dtype
        cosine = torch.nn.functional.cosine_similarity(
            gradient.float().flatten(), wanted[key].flatten(), dim=0
        )
        assert cosine > 0.8, (key, float(cosine))


def test_a_single_precision_residual_keeps_half_precision_layers() -> None:
    weights, loss, got = train_once(params_dtype=torch.bfloat16, bf16=True, fp32_residual_connection=True)
    _, wanted_loss, _ = train_once(weights)
    assert abs(float(loss - wanted_loss)) < 0.02
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in got.values())


def test_deterministic_mode_repeats_bitwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    weights, loss, wanted = train_once(deterministic_mode=True)
    _, again, got = train_once(weights, deterministic_mode=True)
    assert torch.equal(loss, again)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_scores_stay_in_single_precision_under_half_precision_parameters() -> None:
    config = tiny_config(params_dtype=torch.bfloat16, bf16=True)
    model = build_gpt(config, get_sparsek_layer_spec(config, sparsek=SPARSEK))
    attention = model.decoder.layers[0].self_attention
    scores = attention.scores(torch.randn(16, 2, config.hidden_size, dtype=torch.bfloat16))
    assert scores.dtype == torch.float32 and scores.shape == (2, 16, 2)
