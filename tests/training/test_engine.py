# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed is told: parameter groups, configuration, and a view of the groups without its own traps."""

import dataclasses
import shutil
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.engine import (
    build_optimizer,
    deepspeed_config,
    parameter_groups,
    set_learning_rate,
)
from sparsek_megatron.training.parallel import DeepSpeedMpu, Machine

CONFIG = TrainingConfig(
    weight_decay=0.1, sparsek_lr_mult=3.0, tensor_model_parallel_size=2, micro_batch_size=2, global_batch_size=16
)


def scored_model() -> torch.nn.Module:
    model = torch.nn.Module()
    model.linear = torch.nn.Linear(4, 4, bias=False)
    model.norm = torch.nn.LayerNorm(4, bias=False)
    model.scorer = torch.nn.Module()
    model.scorer.weight = torch.nn.Parameter(torch.zeros(4, 2))
    model.scorer.slope = torch.nn.Parameter(torch.zeros(2))
    for parameter in model.scorer.parameters():
        parameter.sparsek_scorer = True
    return model


def test_norms_and_slopes_do_not_decay_and_the_scorer_has_its_own_rate():
    model = scored_model()
    groups = parameter_groups(CONFIG, model)
    found = {
        name: (group["weight_decay"], group["lr_mult"])
        for name, parameter in model.named_parameters()
        for group in groups
        if any(parameter is p for p in group["params"])
    }
    assert found == {
        "linear.weight": (0.1, 1.0), "norm.weight": (0.0, 1.0),
        "scorer.weight": (0.1, 3.0), "scorer.slope": (0.0, 3.0),
    }  # fmt: skip
    assert sum(len(group["params"]) for group in groups) == 4
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_learning_rate(SimpleNamespace(optimizer=optimizer), 0.5)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.5, 1.5]


@pytest.mark.parametrize(("world", "steps"), [(2, 8), (4, 4), (8, 2)])
def test_the_global_batch_is_shared_by_data_parallel_ranks_alone(world, steps):
    machine = Machine(0, world, torch.device("cpu"), torch.distributed.HashStore())
    config = deepspeed_config(CONFIG, machine)
    assert config["gradient_accumulation_steps"] == steps
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert not config["bf16"]["enabled"]
    stage3 = deepspeed_config(dataclasses.replace(CONFIG, zero_stage=3), machine)
    assert stage3["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize("runs", [True, False])
def test_an_apex_without_its_cuda_extensions_is_passed_over(monkeypatch, capsys, runs):
    class FusedAdam(torch.optim.AdamW):
        def __init__(self, groups, adam_w_mode, **options):
            if not runs:
                raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")
            super().__init__(groups, **options)

    for name in ("apex", "apex.optimizers"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.FusedAdam = FusedAdam
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(shutil, "which", lambda _: None)  # no compiler for DeepSpeed's
    machine = Machine(0, 1, torch.device("cuda"), torch.distributed.HashStore())
    optimizer, name = build_optimizer(CONFIG, parameter_groups(CONFIG, scored_model()), machine)
    assert name == ("Apex FusedAdam" if runs else "torch fused AdamW") and len(optimizer.param_groups) == 4
    said = capsys.readouterr().out
    assert said == "" if runs else said.startswith("Apex FusedAdam does not run here (apex.optimizers.FusedAdam req")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "torch fused AdamW"), ({"zero_stage": 2}, "torch fused AdamW"), ({"bf16": False}, "DeepSpeed FusedAdam"),
        ({"zero_stage": 3}, "DeepSpeed FusedAdam"), ({"zero_stage": 0}, "DeepSpeed FusedAdam"),
    ],
)  # fmt: skip
def test_zero_1_and_2_in_bf16_take_the_optimizer_that_skips_on_the_device(monkeypatch, changes, name):
    class FusedAdam(torch.optim.AdamW):
        def __init__(self, groups, adam_w_mode, **options):
            super().__init__(groups, **options)

    monkeypatch.setattr("deepspeed.ops.adam.FusedAdam", FusedAdam)
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")
    machine = Machine(0, 1, torch.device("cuda"), torch.distributed.HashStore())
    config = dataclasses.replace(CONFIG, **{"zero_stage": 1, **changes})
    optimizer, said = build_optimizer(config, parameter_groups(config, scored_model()), machine)
    assert said == name and bool(optimizer.param_groups[0]["fused"]) == (name == "torch fused AdamW")


def test_deepspeed_is_shown_no_sequence_parallelism():
    names = dir(DeepSpeedMpu)
    assert not [name for name in names if "sequence" in name]
    for kind in ("data", "model", "tensor_model", "pipeline_model"):
        assert {f"get_{kind}_parallel_{what}" for what in ("group", "rank", "world_size")} <= set(names)
    assert "get_data_parallel_group_ranks" in names
