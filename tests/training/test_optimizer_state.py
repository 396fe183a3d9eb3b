# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's optimizer state in another kind of optimizer; `test_parallel_training` resumes the same kind."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsek_megatron.training.optimizer_state import keep_own_settings
from sparsek_megatron.training.zero_step import skips_on_device


class Counting(torch.optim.Optimizer):
    """Adam of torch's formula with `step` where other packages keep it, in the state or in the group. DeepSpeed's
    FusedAdam has one in the group too, which it never advances.
    """

    def __init__(self, params: Any, lr: float = 1e-3, *, places: tuple[str, ...]):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01})
        self.places = places

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if self.places == ("group",):
                group["step"] = group.get("step", 0) + 1
            elif "group" in self.places:
                group.setdefault("step", 0)
            for parameter in group["params"]:
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state.update(exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
                if "state" in self.places:
                    state["step"] = state.get("step", 0) + 1
                steps = state["step"] if "state" in self.places else group["step"]
                assert type(steps) is int
                first, second = group["betas"]
                state["exp_avg"].lerp_(parameter.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
                scale = (state["exp_avg_sq"] / (1 - second**steps)).sqrt() + group["eps"]
                parameter.data.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.data.addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - first**steps))


KINDS: dict[str, Any] = {
    "torch": lambda groups, **settings: torch.optim.AdamW(groups, **settings),
    "torch fused": lambda groups, **settings: torch.optim.AdamW(groups, fused=True, **settings),
    "DeepSpeed": lambda groups, **settings: Counting(groups, places=("state", "group"), **settings),
    "CPUAdam": lambda groups, **settings: Counting(groups, places=("state",), **settings),
    "Apex": lambda groups, **settings: Counting(groups, places=("group",), **settings),
}


def optimizer(kind: str, values: list[Tensor], **settings: Any) -> torch.optim.Optimizer:
    weights = [torch.nn.Parameter(value.clone()) for value in values]
    made = KINDS[kind]([{"params": [weights[0]], "lr_mult": 1.0}, {"params": weights[1:], "lr_mult": 3.0}], **settings)
    keep_own_settings(made)
    return made


def weights_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter.data for group in optimizer.param_groups for parameter in group["params"]]


def take_steps(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("loading", KINDS)
@pytest.mark.parametrize("saving", KINDS)
def test_an_optimizer_goes_on_where_another_kind_stopped(saving, loading):
    generator = torch.Generator().manual_seed(7)
    values = [torch.randn(shape, generator=generator) for shape in ((5, 3), (7,), (2, 2))]
    uninterrupted = optimizer("torch", values)
    take_steps(uninterrupted, 0, 9)

    saved = optimizer(saving, values)
    take_steps(saved, 0, 5)
    loaded = optimizer(loading, weights_of(saved))
    loaded.load_state_dict(saved.state_dict())
    take_steps(loaded, 5, 7)
    again = optimizer(loading, weights_of(loaded))
    again.load_state_dict(loaded.state_dict())
    take_steps(again, 7, 8)
    loaded = optimizer(saving, weights_of(again))
    loaded.load_state_dict(again.state_dict())
    take_steps(loaded, 8, 9)
    for own, wanted in zip(weights_of(loaded), weights_of(uninterrupted), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-6)  # a step count that restarts changes 1e-3


@pytest.mark.parametrize("saving", KINDS)
def test_settings_stay_those_of_the_run_and_so_does_the_kernel(saving):
    values = [torch.ones(3), torch.ones(2)]
    saved = optimizer(saving, values)
    take_steps(saved, 0, 2)
    loaded = optimizer("torch fused", values, lr=0.5, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    before = [{name: value for name, value in group.items() if name != "params"} for group in loaded.param_groups]
    loaded.load_state_dict(saved.state_dict())
    assert [{n: v for n, v in group.items() if n != "params"} for group in loaded.param_groups] == before
    assert skips_on_device(SimpleNamespace(dtype=torch.bfloat16, optimizer=loaded))
    unchanged = [weight.clone() for weight in weights_of(loaded)]
    loaded.found_inf = torch.ones(())  # pyright: ignore[reportAttributeAccessIssue]
    take_steps(loaded, 2, 3)
    assert all(map(torch.equal, weights_of(loaded), unchanged))


def test_a_parameter_that_took_fewer_steps_keeps_its_own_count():
    saved = optimizer("torch", [torch.ones(3), torch.ones(2), torch.ones(4)])
    take_steps(saved, 0, 3)
    saved.param_groups[1]["params"][1].grad = None
    saved.param_groups[1]["params"][0].grad = torch.ones(2)
    saved.step()
    loaded = optimizer("torch", weights_of(saved))
    loaded.load_state_dict(saved.state_dict())
    assert [float(loaded.state[p]["step"]) for group in loaded.param_groups for p in group["params"]] == [4, 4, 3]


def test_a_state_of_other_groups_is_refused():
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="the state has 1 parameter groups, this run 2"):
        optimizer("torch", [torch.ones(3), torch.ones(2)]).load_state_dict(other.state_dict())


def test_a_state_before_the_first_step_has_no_count():
    values = [torch.ones(3), torch.ones(2)]
    loaded = optimizer("CPUAdam", values)
    loaded.load_state_dict(optimizer("torch", values).state_dict())
    assert not loaded.state and "step" not in loaded.param_groups[0]
