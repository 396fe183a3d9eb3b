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
    real = rope.fused_rope

    def counting(t: torch.Tensor, freqs: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append(tuple(t.shape))
        return real(t, freqs, **options)

    monkeypatch.setattr(rope, "fused_rope", counting)
    config = tiny_config()
    model = build_gpt(
        config, get_sparsek_layer_spec(config, sparsek=SparseKConfig(topk=32, window=32, stride=4))
    )
    loss, gradients = loss_and_gradients(model, batch())
    assert not calls
    rope.use_fused_rope(config)
    fused_loss, fused = loss_and_gradients(model, batch())
    assert calls == 2 * [(64, 2, 4, 8), (64, 2, 2, 8)]
    torch.testing.assert_close(fused_loss, loss, rtol=1e-6, atol=0)
    assert max(relative_errors(fused, gradients).values()) < 1e-5


def test_transformer_engines_kernel_is_left_in_place(slot: None, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = object()
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", theirs)
    rope.use_fused_rope(tiny_config_for_rope())
    assert rope_utils.fused_apply_rotary_pos_emb is theirs


@pytest.mark.parametrize(
    ("setting", "flag"),
    [
        ({"multi_latent_attention": True}, "--multi-latent-attention"),
        ({"mrope_section": [4, 4]}, "--mrope-section"),
    ],
)
def test_other_kinds_of_rope_are_refused(setting: dict[str, Any], flag: str) -> None:
    config = tiny_config_for_rope()
    vars(config).update(setting)
    with pytest.raises(NotImplementedError, match=flag):
        rope.use_fused_rope(config)


def tiny_config_for_rope() -> Any:
    return type("Config", (), {"multi_latent_attention": False, "apply_rope_fusion": False})()


def angles(tokens: int, rotated: int, *, interleaved: bool = False, first: int = 0) -> torch.Tensor:
    """As megatron-core's: [s, 1, 1, r] fp32, of positions from `first` on."""
    half = rotated // 2
    one = (first + torch.arange(tokens))[:, None] / 10_000 ** (torch.arange(half) / half)
    both = torch.stack((one, one), -1).flatten(1) if interleaved else torch.cat((one, one), 1)
    return both[:, None, None, :].float()


def compare(t: torch.Tensor, freqs: torch.Tensor, interleaved: bool, tolerance: float) -> None:
    """Output and gradient against megatron-core's function in float64."""
    t = t.detach().requires_grad_()
    d_out = torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).to(t)
    out = rope.fused_rope(t, freqs, interleaved=interleaved)
    (gradient,) = torch.autograd.grad(out, t, d_out)
    exact_t = t.detach().double().requires_grad_()
    exact = rope_utils._apply_rotary_pos_emb_bshd(exact_t, freqs.double(), rotary_interleaved=interleaved)
    (exact_gradient,) = torch.autograd.grad(exact, exact_t, d_out.double())
    for got, want in ((out, exact), (gradient, exact_gradient)):
        assert got.dtype == t.dtype
        assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "width", "rotated"), [(33, 3, 16, 16), (5, 1, 20, 12)])
def test_turning_agrees_with_float64(
    tokens: int, heads: int, width: int, rotated: int, interleaved: bool
) -> None:
    """Queries as megatron-core cuts them out of the projection: neither heads nor tokens are contiguous."""
    projected = torch.randn(tokens, 2, heads, width + 8, generator=torch.Generator().manual_seed(0))
    compare(projected[..., :width], angles(tokens, rotated, interleaved=interleaved), interleaved, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [64, 1000])
def test_the_compiled_kernel_agrees_with_float64(tokens: int, dtype: torch.dtype, interleaved: bool) -> None:
    """At positions behind a million, where cosines need their arguments reduced."""
    projected = torch.randn(tokens, 2, 4, 160, device="cuda", dtype=dtype)
    freqs = angles(tokens, 128, interleaved=interleaved, first=1 << 20).cuda()
    compare(projected[..., :128], freqs, interleaved, max(1e-5, torch.finfo(dtype).eps))


@pytest.mark.gpu
def test_a_cuda_graph_keeps_its_cosines_when_other_angles_come() -> None:
    t, freqs = torch.randn(256, 2, 4, 128, device="cuda"), angles(256, 128).cuda()
    want = rope.fused_rope(t, freqs)  # leaves its cosines for the next call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rope.fused_rope(t, freqs)
    rope.fused_rope(t, freqs + 1)
    filling = [torch.full_like(freqs, float("nan")) for _ in range(64)]  # where the first cosines were
    graph.replay()
    assert len(filling) and torch.equal(out, want)
