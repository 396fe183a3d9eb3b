# SPDX-License-Identifier: Apache-2.0
"""One norm in the place of DeepSpeed's two looks at every gradient; `test_parallel_training` trains with it."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed import comm
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from sparsek_megatron.training.zero_step import (
    _clip,
    _norm_of_all,
    norm_of_step,
    skips_on_device,
    use_one_norm,
)


def padding(*shape: int) -> Tensor:
    filled = torch.full(shape, 7.0)  # not 0: it would show in the norm
    filled._zero_padding = True  # pyright: ignore[reportAttributeAccessIssue]
    return filled


def zero_optimizer(rank: int, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """What the norm reads: two groups, the second of which this rank fills up."""
    sharded, shared, last = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (6,)))
    sharded.tensor_model_parallel = last.tensor_model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]
    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(p.shape, generator=generator).to(dtype) for p in (sharded, shared, last)]
    return SimpleNamespace(
        model_parallel_rank=rank,
        params_in_partition=[[sharded, shared], [last]],
        averaged_gradients=[gradients[:2], [padding(2), gradients[2], padding(4)]],
        device="cpu", dp_process_group="dp", loss_scale=1.0, clip_grad=0.5,
        is_told_to_skip=dtype == torch.bfloat16, optimizer=torch.optim.AdamW([sharded, shared, last], fused=True),
        _model_parallel_all_reduce=lambda tensor, op: tensor.add_(100.0),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data-parallel ranks double a sum of squares; tensor-parallel ones add 100 to it."""
    monkeypatch.setattr(comm, "all_reduce", lambda tensor, group: tensor.mul_(2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 1])
def test_norm_counts_each_weight_once(rank: int, dtype: torch.dtype) -> None:
    zero = zero_optimizer(rank, dtype)
    (sharded, shared), (_, last, _) = zero.averaged_gradients
    counted = [sharded, last] + ([shared] if rank == 0 else [])
    square = 2 * sum(float(g.double().square().sum()) for g in counted) + 100
    norm = _norm_of_all(zero)
    assert norm.shape == () and norm.dtype == torch.float32
    assert float(norm) == pytest.approx(square**0.5, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_makes_the_norm_infinite(bad: float) -> None:
    zero = zero_optimizer(0)
    zero.averaged_gradients[1][1][3] = bad
    assert float(_norm_of_all(zero)) == float("inf")
    assert not hasattr(zero.optimizer, "found_inf")


@pytest.mark.parametrize("bad", [None, float("nan")])
def test_a_fused_optimizer_is_told_on_the_device(bad: float | None) -> None:
    zero = zero_optimizer(0, torch.bfloat16)
    if bad is not None:
        zero.averaged_gradients[0][1][2] = bad
    norm = _norm_of_all(zero)
    assert zero.optimizer.found_inf.shape == () and float(zero.optimizer.found_inf) == float(bad is not None)
    zero.overflow, engine = False, SimpleNamespace(optimizer=zero, skipped_steps=4)
    assert norm_of_step(engine) == float(norm)
    assert zero.overflow == (bad is not None) and engine.skipped_steps == 4 + zero.overflow


@pytest.mark.parametrize(
    ("kind", "fused", "dtype", "decides"),
    [
        (torch.optim.AdamW, True, torch.bfloat16, True), (torch.optim.AdamW, True, torch.float32, False),
        (torch.optim.AdamW, False, torch.bfloat16, False), (torch.optim.SGD, True, torch.bfloat16, False),
    ],
)  # fmt: skip
def test_only_torchs_fused_adamw_decides_on_the_device_and_in_bf16_alone(kind, fused, dtype, decides) -> None:
    made = kind([torch.nn.Parameter(torch.zeros(2))], lr=0.1, fused=fused)
    assert skips_on_device(SimpleNamespace(dtype=dtype, optimizer=made)) == decides


def test_a_rank_without_gradients_still_takes_part() -> None:
    zero = zero_optimizer(0)
    zero.averaged_gradients = [[padding(3)], [padding(6)]]
    assert float(_norm_of_all(zero)) == 10.0


@pytest.mark.parametrize(("clip_grad", "norm", "scale"), [(0.5, 2.0, 0.25), (0.5, 0.1, 1.0), (0.0, 2.0, 1.0)])
def test_gradients_are_clipped_as_deepspeed_clips_them(clip_grad: float, norm: float, scale: float) -> None:
    zero = zero_optimizer(0)
    zero.clip_grad, zero.device = clip_grad, "cpu"
    ours, theirs = torch.randn(9), torch.empty(9)
    theirs.copy_(ours)
    before = ours.clone()
    _clip(zero, [ours], torch.tensor(norm))
    DeepSpeedZeroOptimizer.unscale_and_clip_grads(zero, [theirs], torch.tensor(norm))  # pyright: ignore[reportArgumentType]
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(ours, before * scale, rtol=1e-5, atol=0)


def test_only_zero_1_and_2_with_state_on_the_device_are_changed() -> None:
    assert not use_one_norm(SimpleNamespace(optimizer=torch.optim.SGD([torch.zeros(1)])))
    zero = DeepSpeedZeroOptimizer.__new__(DeepSpeedZeroOptimizer)
    zero.cpu_offload, zero.has_moe_layers, zero.compute_grad_norm = True, False, True
    assert not use_one_norm(SimpleNamespace(optimizer=zero))
    zero.cpu_offload, zero.compute_grad_norm = False, False
    assert not use_one_norm(SimpleNamespace(optimizer=zero)), "without a norm DeepSpeed's own look is needed"
    zero.compute_grad_norm = zero.check_grad_overflow = True
    zero.dtype, zero.optimizer = torch.bfloat16, torch.optim.SGD([torch.zeros(1)])
    assert use_one_norm(SimpleNamespace(optimizer=zero)) and zero.check_grad_overflow and not zero.is_told_to_skip
    zero.optimizer = torch.optim.AdamW([torch.zeros(1)], fused=True)
    assert use_one_norm(SimpleNamespace(optimizer=zero)) and zero.is_told_to_skip and not zero.check_grad_overflow
    zero.overflow = True
    zero.check_overflow(partition_gradients=False)
    assert not zero.overflow
