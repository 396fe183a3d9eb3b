# SPDX-License-Identifier: Apache-2.0
"""A saved optimizer state in this run's optimizer: moments and step counts are the checkpoint's, settings this run's.

By itself an optimizer takes the settings of its groups from the checkpoint too, and which kernel it runs is one of
them: after a run on CPU, or with DeepSpeed's FusedAdam, torch's fused AdamW would go on as one that cannot skip a step
by itself (`zero_step`). Where a step is counted differs as well:

    torch's AdamW, fused or not         a float32 tensor for each parameter
    DeepSpeed's FusedAdam and CPUAdam   a number for each parameter
    Apex's FusedAdam                    a number for each group
"""

from __future__ import annotations

from typing import Any

import torch


def keep_own_settings(optimizer: torch.optim.Optimizer) -> None:
    """Let `optimizer.load_state_dict` take the state of any of these, and keep its own settings: learning rate, decay,
    betas, kernel.
    """
    optimizer.register_load_state_dict_pre_hook(_as_own)


def _as_own(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    in_tensors = isinstance(optimizer, torch.optim.AdamW)
    if len(optimizer.param_groups) != len(saved["param_groups"]):
        raise ValueError(
            f"the state has {len(saved['param_groups'])} parameter groups, this run {len(optimizer.param_groups)}: "
            "keep the model's settings"
        )
    state, groups = dict(saved["state"]), []
    for own, group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        settings = {name: value for name, value in own.items() if name not in ("params", "step")}
        # Each kind leaves the others' count where it was when it took the state over: the larger one is in force.
        of_group = most = int(group.get("step", 0))
        for key in group["params"]:
            if entries := state.get(key):
                steps = max(of_group, int(entries.get("step", 0)))
                state[key] = entries | {"step": torch.tensor(steps, dtype=torch.float32) if in_tensors else steps}
                most = max(most, steps)
        groups.append(settings | {"params": group["params"]} | ({"step": most} if most and not in_tensors else {}))
    return saved | {"state": state, "param_groups": groups}
