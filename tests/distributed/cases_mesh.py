# SPDX-License-Identifier: Apache-2.0
"""Meshes of (tensor, context, expert, data) parallel ranks against one process. Data parallelism takes what is left of
the launched ranks, so the same cases run on 2, 4 and 8; a case that needs more than there are answers None.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from mcore_harness import RECOMPUTE
from mesh import SCALE, parity
from worker import case

from sparsek_megatron.context_parallel.exchange import StartFromEarlierChunks

MOE = {
    "num_moe_experts": 4,
    "moe_token_dispatcher_type": "allgather",
    "moe_router_load_balancing_type": "none",
}
SP = {"sequence_parallel": True}
PACKED = [SCALE * n for n in (0, 40, 40, 44, 96)]
DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16}[os.environ.get("MESH_DTYPE", "float32")]


def on(ranks: int, **settings: Any) -> dict[str, Any] | None:
    """`parity`, where the launch has `ranks` ranks or a multiple."""
    return parity(dtype=DTYPE, **settings) if dist.get_world_size() % ranks == 0 else None


@case
def mesh_tp2() -> Any:
    return on(2, tp=2)


@case
def mesh_tp2_sp() -> Any:
    return on(2, tp=2, mesh=SP)


@case
def mesh_tp4() -> Any:
    return on(4, tp=4)


@case
def mesh_dp() -> Any:
    return on(2)


@case
def mesh_cp2() -> Any:
    return on(2, cp=2)


@case
def mesh_cp4() -> Any:
    return on(4, cp=4)


@case
def mesh_cp2_a2a() -> Any:
    return on(2, cp=2, mesh={"cp_comm_type": "a2a"})


@case
def mesh_tp2_cp2_sp() -> Any:
    return on(4, tp=2, cp=2, mesh=SP)


@case
def mesh_tp2_cp2() -> Any:
    return on(4, tp=2, cp=2)


@case
def mesh_cp2_recompute() -> Any:
    return on(2, cp=2, mesh=RECOMPUTE)


@case
def mesh_cp2_selective_recompute_own_norm_of_the_scorer() -> Any:
    return on(2, cp=2, mesh={"recompute_granularity": "selective"}, sparsek={"scorer_norm": True})


@case
def mesh_cp2_packed() -> Any:
    """Sequences of which each is sharded on its own, one of them empty, one of a single token per chunk."""
    return on(2, cp=2, size=1, bounds=PACKED)


@case
def mesh_cp2_packed_padded() -> Any:
    """Sequences of 37, 1 and 49 tokens (on CPU), padded to what context parallelism can divide."""
    bounds = [SCALE * n for n in (0, 40, 44, 96)]
    return on(2, cp=2, size=1, bounds=bounds, padding=3)


@case
def mesh_cp2_a2a_packed() -> Any:
    return on(2, cp=2, size=1, bounds=PACKED, mesh={"cp_comm_type": "a2a"})


@case
def mesh_ep2() -> Any:
    return on(2, ep=2, mesh={"expert_model_parallel_size": 2}, **MOE)


@case
def mesh_tp2_cp2_dp2_sp() -> Any:
    return on(8, tp=2, cp=2, mesh=SP)


@case
def control_without_gradients_of_carried_rows() -> Any:
    """The errors that show where a chunk's gradients of earlier chunks' keys are dropped."""
    kept = StartFromEarlierChunks.backward

    def dropping(ctx: Any, *gradients: torch.Tensor) -> Any:
        first = ctx.exchange.sizes.pool + ctx.exchange.sizes.recent
        for gradient in gradients[2:]:
            gradient[:, :first] = 0
        return kept(ctx, *gradients)

    try:
        StartFromEarlierChunks.backward = staticmethod(dropping)
        return on(2, cp=2)
    finally:
        StartFromEarlierChunks.backward = kept
