# SPDX-License-Identifier: Apache-2.0
"""The norm computes what torch's does, and the CPU shims keep Megatron's random streams apart."""

from __future__ import annotations

import pytest
import torch
from mcore_harness import tiny_config
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from sparsek_megatron import Norm
from sparsek_megatron.norm import QKNorm

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("norm", [Norm, QKNorm])
def test_output_and_gradients_equal_torch(norm: type[Norm], kind: str, zero_centered: bool) -> None:
    config = tiny_config(
        normalization=kind, layernorm_zero_centered_gamma=zero_centered, params_dtype=torch.float64
    )
    ours = norm(config, 24, 1e-3)
    theirs = getattr(torch.nn, kind)(24, eps=1e-3, dtype=torch.float64)
    assert torch.equal(ours.weight, theirs.weight - (1 if zero_centered else 0)), "starts as the plain norm"
    with torch.no_grad():
        theirs.weight.normal_(1, 0.3)
        ours.weight.copy_(theirs.weight - (1 if zero_centered else 0))
        if kind == "LayerNorm":
            ours.bias.copy_(theirs.bias.normal_())
    x = torch.randn(5, 3, 24, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(y) for module, y in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    for out in outputs:
        out.sin().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_unknown_normalizations_are_refused() -> None:
    config = tiny_config()
    config.normalization = "L2Norm"
    with pytest.raises(NotImplementedError, match="--normalization L2Norm"):
        Norm(config, 8)


def test_forked_random_streams_continue_where_they_stopped_and_leave_the_default_alone() -> None:
    model_parallel_cuda_manual_seed(5)
    tracker = get_cuda_rng_tracker()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with tracker.fork():
        first = torch.rand(4)
    with tracker.fork():
        second = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    model_parallel_cuda_manual_seed(5)
    with get_cuda_rng_tracker().fork():
        assert torch.equal(torch.rand(8)[:4], first)
    with pytest.raises(KeyError, match="never added"), tracker.fork("unknown"):
        pass
