# SPDX-License-Identifier: Apache-2.0
"""Pipelines and Megatron's own optimizer: gradients after `finalize_model_grads`, then a short training run. On GPUs as
they are, on CPU with what Megatron needs for that.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from cuda_to_cpu import cuda_to_cpu
from mcore_harness import parallel, randomise, relative_errors, shard_of, unshard
from mcore_training import Training
from megatron.core.models.gpt import gpt_layer_specs
from worker import case

from sparsek_megatron import (
    SparseKConfig,
    SparseKSelfAttention,
    get_sparsek_block_spec,
    get_sparsek_layer_spec,
)

STEPS = 20
COMPARED = 5
SPARSEK: dict[str, Any] = {"topk": 5, "window": 5, "stride": 4, "pool": 12, "reference_length": 32}


def train(
    tp: int, pp: int, steps: int, *, vpp: int | None = None, weights: dict[str, torch.Tensor] | None = None,
    distributed: bool = True, sparsek: SparseKConfig | None = None, layer_spec: bool = False, stock: bool = False,
    overlap: bool = False, cp: int = 1, **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """Losses and gradient norms of `steps` steps, whole gradients of the first, and what was built.

    The distributed optimizer leaves a rank with its own part of the reduced gradients, so that whole gradients are
    there to compare only without it, or with one data-parallel rank.
    """
    sparsek = sparsek or SparseKConfig(**SPARSEK)

    def spec(config: Any, vp_stage: int | None) -> Any:
        if stock:
            return gpt_layer_specs.get_gpt_decoder_block_spec(
                config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
            )
        if layer_spec:
            return get_sparsek_layer_spec(config, sparsek=sparsek)
        return get_sparsek_block_spec(config, sparsek=sparsek, vp_stage=vp_stage)

    as_on_a_gpu = contextlib.nullcontext() if torch.cuda.is_available() else cuda_to_cpu()
    with parallel(tp=tp, pp=pp, vpp=vpp, cp=cp), as_on_a_gpu:
        from megatron.core import parallel_state

        given = (
            None
            if weights is None
            else (lambda name, p: shard_of(name, p, weights[name]) if name in weights else p)
        )
        training = Training(
            spec, sparsek, vpp=vpp, distributed=distributed, overlap=overlap, weights=given, **changes
        )
        if weights is None:
            randomise(training.chunks[0].module)
            training.optimizer.reload_model_params()
        initial = {name: unshard(name, p, p.data).cpu() for name, p in training.named_parameters()}
        losses = [training.forward_backward(0)]
        whole = not distributed or parallel_state.get_data_parallel_world_size() == 1
        parameters = training.named_parameters() if whole else []
        gradients = {name: unshard(name, p, p.main_grad).cpu() for name, p in parameters}
        kinds = {}
        for name, module in zip(*_layers(training), strict=True):
            kinds[name] = isinstance(module.self_attention, SparseKSelfAttention)
        norms = []
        for step in range(steps):
            losses.append(training.step(step))
            norms.append(float(training.grad_norm))
        stages: list[Any] = [None] * pp
        group = parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.all_gather_object(stages, (initial, gradients, kinds), group=group)
        merged = [{k: v for stage in stages for k, v in stage[i].items()} for i in range(3)]
        return {
            "losses": losses[1:],
            "norms": norms,
            **dict(zip(("initial", "gradients", "kinds"), merged, strict=True)),
        }


def _layers(training: Training) -> tuple[list[int], list[Any]]:
    """Global indices and modules of this rank's layers."""
    from sparsek_megatron.compat import stage_layer_indices

    indices, modules = [], []
    for stage, chunk in enumerate(training.chunks):
        vp_stage = stage if len(training.chunks) > 1 else None
        indices += stage_layer_indices(training.config, vp_stage=vp_stage, pp_rank=None)
        modules += list(chunk.module.decoder.layers)
    return indices, modules


def compare(reference: dict[str, Any], got: dict[str, Any]) -> dict[str, Any]:
    """Relative errors of the first step's gradients, and of losses and norms of the steps that both have made."""
    answer = {"gradients": got["gradients"] and relative_errors(got["gradients"], reference["gradients"])}
    for name in ("losses", "norms"):
        steps = zip(reference[name], got[name], strict=False)
        answer[name] = [abs(a - b) / abs(a) for a, b in steps]
    return answer


@functools.cache
def one_process() -> dict[str, Any]:
    return train(1, 1, COMPARED, distributed=False)


@case
def training_tp2_pp2_sp() -> dict[str, Any]:
    reference = one_process()
    got = train(2, 2, STEPS, weights=reference["initial"], sequence_parallel=True)
    return {**compare(reference, got), "course": got["losses"]}


@case
def training_cp2_pp2() -> dict[str, Any]:
    reference = one_process()
    got = train(1, 2, COMPARED, cp=2, distributed=False, weights=reference["initial"])
    return compare(reference, got)


@functools.cache
def one_process_of_four_rows() -> dict[str, Any]:
    return train(1, 1, 2, distributed=False, rows=4)


def with_split_batch(tp: int) -> dict[str, Any]:
    """Megatron's DDP over what is left of the ranks, each with its own rows, against one process with all of them."""
    reference = one_process_of_four_rows()
    got = train(tp, 1, 2, distributed=False, weights=reference["initial"], rows=4, split_batch=True)
    return compare(reference, got)


@case
def training_dp() -> dict[str, Any]:
    return with_split_batch(1)


@case
def training_tp2_dp() -> dict[str, Any]:
    return with_split_batch(2)


@case
def training_pp2() -> dict[str, Any] | None:
    """For a launch of two ranks."""
    if torch.distributed.get_world_size() != 2:
        return None
    reference = one_process()
    return compare(reference, train(1, 2, COMPARED, distributed=False, weights=reference["initial"]))


@case
def covering_selection_on_pp2_tp2_sp() -> dict[str, Any]:
    """A SparseK model with topk + window >= s in a pipeline against the stock dense model in one process."""
    covering = SparseKConfig(topk=20, window=12, stride=4)
    reference = train(1, 1, 2, distributed=False, stock=True)
    got = train(2, 2, 2, sparsek=covering, weights=reference["initial"], sequence_parallel=True)
    for kept in ("gradients", "initial"):
        got[kept] = {name: t for name, t in got[kept].items() if "scorer" not in name}
    return compare(reference, got)


@case
def training_tp2_dp2_sp_qk_norm() -> dict[str, Any]:
    reference = train(1, 1, 3, distributed=False, qk_layernorm=True)
    changes = {"weights": reference["initial"], "sequence_parallel": True, "qk_layernorm": True}
    got = train(2, 1, 3, overlap=True, **changes)
    return compare(reference, got)


@case
def dense_layers_under_virtual_pipelines() -> dict[str, Any]:
    sparsek = SparseKConfig(**SPARSEK, dense_layers=(0, -1))
    reference = train(1, 1, 1, distributed=False, sparsek=sparsek, num_layers=4)
    answer: dict[str, Any] = {"reference": reference["kinds"]}
    for name, settings in {
        "pp2": {"pp": 2},
        "pp2_vpp2": {"pp": 2, "vpp": 2},
        "pp2_vpp2_layer_spec": {"pp": 2, "vpp": 2, "layer_spec": True},
    }.items():
        got = train(2, steps=1, num_layers=4, sparsek=sparsek, weights=reference["initial"], **settings)
        answer[name] = {"kinds": got["kinds"], **compare(reference, got)}
    return answer
