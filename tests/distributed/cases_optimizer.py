# SPDX-License-Identifier: Apache-2.0
"""The state of megatron-core's distributed optimizer in a distributed checkpoint, across tensor-parallel sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from cases_checkpoint import shared_folder
from cuda_to_cpu import cuda_to_cpu
from mcore_harness import parallel, randomise
from mcore_training import Training
from megatron.core import dist_checkpointing
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from worker import case

from sparsek_megatron import SparseKConfig, get_sparsek_block_spec

SPARSEK = SparseKConfig(topk=5, window=5, stride=4, pool=12, reference_length=32)
BEFORE, AFTER = 3, 3


@contextlib.contextmanager
def torch_adam_loads() -> Iterator[None]:
    """Lets the fully reshardable format load into torch's Adam, which counts steps in every parameter's state.

    Apex's and TE's count them in the group. For torch's, megatron-core's loader sets one tensor for all parameters,
    which each of them would then count up, and looks for a count of each parameter in the checkpoint.
    """
    stock = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        state["step"] = state["step"].clone()
        stock(self, model_param, {"step": state["step"], **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = with_step
    try:
        yield
    finally:
        DistributedOptimizer._set_main_param_and_optimizer_states = stock


def training(**changes: Any) -> Training:
    """A model with its DDP and distributed optimizer."""

    def spec(config: Any, vp_stage: int | None) -> Any:
        return get_sparsek_block_spec(config, sparsek=SPARSEK, vp_stage=vp_stage)

    return Training(spec, SPARSEK, num_layers=2, **changes)


def steps(made: Training, first: int, count: int) -> dict[str, list[float]]:
    """Losses and gradient norms of the steps `first`, `first + 1`, ..."""
    losses, norms = [], []
    for step in range(first, first + count):
        losses.append(made.step(step))
        norms.append(float(made.grad_norm))
    return {"losses": losses, "norms": norms}


def compare(got: dict[str, list[float]], want: dict[str, list[float]]) -> dict[str, list[float]]:
    """Relative errors of each step's loss and norm."""
    return {name: [abs(a - b) / abs(b) for a, b in zip(got[name], want[name], strict=True)] for name in want}


@case
def optimizer_state_saved_at_tp2() -> dict[str, Any]:
    """Errors of losses and norms after the save: resumed under other sizes, and without the optimizer's state, against
    going on uninterrupted."""
    folder = shared_folder()
    answer: dict[str, Any] = {}
    with parallel(tp=2), cuda_to_cpu():
        made = training()
        randomise(made.chunks[0].module)
        made.optimizer.reload_model_params()
        steps(made, 0, BEFORE)
        dist_checkpointing.save(made.sharded_state_dict(), str(folder))
        uninterrupted = steps(made, BEFORE, AFTER)
    for name, (tp, changes) in {
        "tp1": (1, {}),
        "tp4": (4, {}),
        "tp4_sp": (4, {"sequence_parallel": True}),
        "tp1_without_the_optimizer": (1, {}),
    }.items():
        with parallel(tp=tp, seed=99), cuda_to_cpu():
            made = training(**changes)
            whole = not name.endswith("optimizer")
            wanted = made.sharded_state_dict(optimizer=whole, loading=True)
            state: Any = dist_checkpointing.load(wanted, str(folder))
            made.chunks[0].module.load_state_dict(state["model"])
            if whole:
                with torch_adam_loads():
                    made.optimizer.load_state_dict(state["optimizer"])
            else:
                made.optimizer.reload_model_params()
            answer[name] = compare(steps(made, BEFORE, AFTER), uninterrupted)
    return answer
