# SPDX-License-Identifier: Apache-2.0
"""Two ranks started with different settings, as Megatron's own script builds their model. For a launch of two.

A process compares its settings once, where it builds its first SparseK layer: the cases run in this order.
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from mcore_harness import build_gpt, parallel, tiny_config
from megatron.core import parallel_state
from worker import case

from sparsek_megatron.environment import settings_from_environment
from sparsek_megatron.specs import sparsek_spec


def build(pp: int = 1, **environment: str) -> str:
    """What building this rank's model from `--spec` and these variables of the environment says."""
    os.environ.update(environment)
    settings_from_environment.cache_clear()
    try:
        with parallel(pp=pp):
            config = tiny_config()
            edges = {
                "pre_process": parallel_state.is_pipeline_first_stage(),
                "post_process": parallel_state.is_pipeline_last_stage(),
            }
            build_gpt(config, sparsek_spec(config), **edges)
        return ""
    except ValueError as error:
        return str(error)
    finally:
        for name in environment:
            del os.environ[name]
        settings_from_environment.cache_clear()


def on_every_rank(mine: str) -> list[str]:
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    return said


@case
def agreement_where_a_stage_has_no_sparsek_layer() -> list[str]:
    """Only rank 1 compares: nobody must wait for rank 0, whose layer is dense."""
    return on_every_rank(build(pp=2, SPARSEK_DENSE_LAYERS="0", SPARSEK_TOPK="16"))


@case
def agreement_of_other_settings_on_rank_0() -> list[str]:
    """Rank 0's first SparseK layer, with another topk than rank 1's."""
    topk = "16" if dist.get_rank() else "8"
    return on_every_rank(build(SPARSEK_DENSE_LAYERS="0", SPARSEK_TOPK=topk))
