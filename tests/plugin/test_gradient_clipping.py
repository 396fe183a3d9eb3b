# SPDX-License-Identifier: Apache-2.0
"""Megatron's clipping with torch's multi-tensor kernels: the same norms and gradients, and nothing read by the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads

from sparsek_megatron.gradient_clipping import use_foreach_clipping

SLOTS = ("l2_norm_impl", "multi_tensor_scale_impl", "multi_tensor_scale_tensor_impl")


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Megatron's stand-ins in the slots, put back at the end."""
    stand_ins = (utils.local_multi_tensor_l2_norm, utils.local_multi_tensor_scale, None)
    for name, value in zip(SLOTS, stand_ins, strict=True):
        if hasattr(clip_grads, name):
            monkeypatch.setattr(clip_grads, name, value)
    yield


def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((40, 30), (7,), (1, 2, 3))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_scaled_gradients_equal_double_precision(stock: None, dtype: torch.dtype) -> None:
    assert use_foreach_clipping() and not use_foreach_clipping()
    slots: Any = clip_grads
    found = gradients(dtype)
    norm, per_tensor = utils.local_multi_tensor_applier(slots.l2_norm_impl, None, [found], False)
    want = torch.cat([g.flatten() for g in found]).double().norm()
    assert norm.shape == (1,) and norm.dtype == torch.float32 and per_tensor is None
    torch.testing.assert_close(norm[0].double(), want, rtol=1e-6, atol=0)
    for scale in (0.5, torch.tensor([0.5])):
        scaled = gradients(dtype)
        utils.local_multi_tensor_applier(slots.multi_tensor_scale_impl, None, [scaled, scaled], scale)
        apart = [torch.empty_like(g) for g in found]
        utils.local_multi_tensor_applier(slots.multi_tensor_scale_impl, None, [found, apart], scale)
        for got, other, before in zip(scaled, apart, found, strict=True):
            assert torch.equal(got, before / 2) and torch.equal(other, got)


def test_other_libraries_kernels_stay(stock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = object()
    monkeypatch.setattr(clip_grads, "l2_norm_impl", theirs)
    assert not use_foreach_clipping()
    assert clip_grads.l2_norm_impl is theirs


@pytest.mark.gpu
def test_clipping_on_a_gpu_reads_at_most_the_norm_of_all(stock: None, megatron_on_cuda: None) -> None:
    """None at all where megatron-core clips by a norm on the device."""
    on_device = hasattr(clip_grads, "multi_tensor_scale_tensor_impl")
    parameters = [torch.nn.Parameter(g.cuda()) for g in gradients(torch.float32)]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    want = torch.cat([p.detach().flatten() for p in parameters]).double()
    use_foreach_clipping()
    torch.cuda.set_sync_debug_mode("error" if on_device else "default")
    try:
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = clip_grads.get_grad_norm_fp32(grads)
        clip_grads.clip_grad_by_total_norm_fp32(parameters, max_norm=0.5, total_norm=norm)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(norm) == pytest.approx(float(want.norm()), rel=1e-6)
    clipped = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).double()
    torch.testing.assert_close(clipped, want * 0.5 / want.norm(), rtol=1e-5, atol=1e-7)
