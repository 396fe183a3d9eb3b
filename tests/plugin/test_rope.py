# SPDX-License-Identifier: Apache-2.0
"""The fused rotary embedding fills megatron-core's empty slot with the same function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mcore_harness import batch, build_gpt, loss_and_gradients, relative_errors, tiny_config
from megatron.core.models.common.embeddings import rope_utils

from sparsek_megatron import SparseKConfig, get_sparsek_layer_spec, rope


@pytest.fixture
def slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty slot, put back at the end."""
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", None)


def test_a_model_is_the_same_and_uses_it(megatron: None, slot: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    plain: Any = rope_utils._apply_rotary_pos_emb_bshd

    def stand_in(t: torch.Tensor, freqs: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append(tuple(t.shape))
        return plain(t, freqs, **options)

    monkeypatch.setattr(rope, "_compiled", lambda: stand_in)  # no compiler is needed to see what is called
    config = tiny_config()
    model = build_gpt(
        config, get_sparsek_layer_spec(config, sparsek=SparseKConfig(topk=32, window=32, stride=4))
    )
    loss, gradients = loss_and_gradients(model, batch())
    assert not calls
    rope.use_fused_rope(config)
    fused_loss, fused = loss_and_gradients(model, batch())
    assert calls == 2 * [(64, 2, 4, 8), (64, 2, 2, 8)]
    assert torch.equal(loss, fused_loss)
    assert set(relative_errors(fused, gradients).values()) == {0.0}


def test_transformer_engines_kernel_is_left_in_place(slot: None, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = object()
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", theirs)
    rope.use_fused_rope(tiny_config_for_rope())
    assert rope_utils.fused_apply_rotary_pos_emb is theirs


def test_multi_latent_attention_is_refused() -> None:
    config = tiny_config_for_rope()
    config.multi_latent_attention = True
    with pytest.raises(NotImplementedError, match="--multi-latent-attention"):
        rope.use_fused_rope(config)


def tiny_config_for_rope() -> Any:
    return type("Config", (), {"multi_latent_attention": False, "apply_rope_fusion": False})()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [64, 1000])
def test_the_compiled_kernel_agrees_with_float64(tokens: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    t = torch.randn(tokens, 1, 4, 128, generator=generator, device="cuda").bfloat16().requires_grad_()
    angles = torch.arange(tokens, device="cuda")[:, None] / 10_000 ** (torch.arange(64, device="cuda") / 64)
    freqs = torch.cat((angles, angles), 1)[:, None, None, :].float()
    d_out = torch.randn(t.shape, generator=generator, device="cuda").bfloat16()
    out = rope._compiled_rope(t, freqs)
    (gradient,) = torch.autograd.grad(out, t, d_out)
    exact_t = t.detach().double().requires_grad_()
    exact = rope_utils._apply_rotary_pos_emb_bshd(exact_t, freqs.double())
    (exact_gradient,) = torch.autograd.grad(exact, exact_t, d_out.double())
    for got, want in ((out, exact), (gradient, exact_gradient)):
        assert got.dtype == torch.bfloat16
        assert (got - want).abs().max() < 0.04
