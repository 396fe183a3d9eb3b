# SPDX-License-Identifier: Apache-2.0
"""The same model on one tensor-parallel rank and on several, in float64: losses and gradients of every
parameter.

float64 because selection is discontinuous: with rounding at 1e-16 the ranks select the same keys whatever
order a matmul reduced in, and what is left to differ is a wrong or missing reduction.
"""

from __future__ import annotations

from typing import Any

import torch
from mcore_harness import (
    RECOMPUTE,
    batch,
    build_gpt,
    full_weights,
    load_full,
    loss_and_gradients,
    packed,
    parallel,
    randomise,
    relative_errors,
    tiny_config,
    unshard,
)
from megatron.core import parallel_state
from megatron.core.models.gpt import gpt_layer_specs
from worker import case

from sparsek_megatron import SparseKConfig, get_sparsek_layer_spec, get_sparsek_mtp_block_spec
from sparsek_megatron.scoring import ScoringNetwork

SPARSEK: dict[str, Any] = {"topk": 6, "window": 5, "stride": 4, "pool": 14, "reference_length": 64}


def run(
    tp: int,
    sequence_parallel: bool,
    model_changes: dict[str, Any],
    sparsek_changes: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
    thd: bool = False,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, torch.Tensor]]:
    """Whole weights, loss and whole gradients of one model under `tp` ranks."""
    with parallel(tp=tp):
        config = tiny_config(params_dtype=torch.float64, sequence_parallel=sequence_parallel, **model_changes)
        sparsek = SparseKConfig(**{**SPARSEK, **sparsek_changes})
        spec = get_sparsek_layer_spec(config, sparsek=sparsek)
        model = build_gpt(config, spec, mtp_block_spec=get_sparsek_mtp_block_spec(config, spec))
        if weights is None:
            randomise(model)
            weights = full_weights(model)
        else:
            load_full(model, weights)
        if thd:
            result = loss_and_gradients(model, batch(64, 1), packed([23, 1, 40]))
        else:
            result = loss_and_gradients(model, batch())
        return weights, *result


_references: dict[str, tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, torch.Tensor]]] = {}


def reference(
    model_changes: dict[str, Any], sparsek_changes: dict[str, Any], thd: bool = False
) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, torch.Tensor]]:
    """The run on one tensor-parallel rank, once for equal settings."""
    key = repr((model_changes, sparsek_changes, thd))
    if key not in _references:
        _references[key] = run(1, False, model_changes, sparsek_changes, thd=thd)
    return _references[key]


def parity(
    tp: int,
    sequence_parallel: bool,
    model_changes: dict[str, Any] | None = None,
    sparsek_changes: dict[str, Any] | None = None,
    thd: bool = False,
) -> dict[str, float]:
    """Relative errors of the loss and of each gradient against one tensor-parallel rank."""
    changes = (model_changes or {}, sparsek_changes or {})
    weights, loss, gradients = reference(*changes, thd=thd)
    _, got_loss, got = run(tp, sequence_parallel, *changes, weights=weights, thd=thd)
    return {"loss": float((got_loss - loss).abs() / loss), **relative_errors(got, gradients)}


@case
def tp2() -> dict[str, float]:
    return parity(2, False)


@case
def tp2_sp() -> dict[str, float]:
    return parity(2, True)


@case
def tp2_sp_multi_token_prediction() -> dict[str, float]:
    return parity(2, True, {"mtp_num_layers": 1})


@case
def tp4_sp_fewer_kv_heads_than_ranks() -> dict[str, float]:
    return parity(4, True)


@case
def tp4_fewer_kv_heads_than_ranks() -> dict[str, float]:
    return parity(4, False)


@case
def tp2_sp_layernorm_qk_norm_own_scorer_norm_mlp_scorer() -> dict[str, float]:
    model = {"normalization": "LayerNorm", "qk_layernorm": True, "layernorm_zero_centered_gamma": True}
    return parity(2, True, model, {"scorer_norm": True, "scorer": "mlp", "gate": "value"})


@case
def tp2_qk_norm_detached_scores() -> dict[str, float]:
    return parity(2, False, {"qk_layernorm": True}, {"detach_hidden": True, "gate": "logit"})


@case
def tp2_sp_packed_sequences() -> dict[str, float]:
    return parity(2, True, thd=True)


@case
def ep2_tp2_sp_experts() -> dict[str, float]:
    """Mixture of experts on two expert-parallel ranks; gradients of the parameters that are not experts'."""
    changes = {
        "num_moe_experts": 4,
        "moe_token_dispatcher_type": "allgather",
        "moe_router_load_balancing_type": "none",
    }
    weights, loss, gradients = reference(changes, {})
    with parallel(tp=2, ep=2):
        config = tiny_config(
            params_dtype=torch.float64, sequence_parallel=True, expert_model_parallel_size=2, **changes
        )
        model = build_gpt(config, get_sparsek_layer_spec(config, sparsek=SparseKConfig(**SPARSEK)))
        first = parallel_state.get_expert_model_parallel_rank() * 2

        def whole_name(name: str) -> str:
            head, _, rest = name.partition(".local_experts.")
            index, _, tail = rest.partition(".")
            return f"{head}.local_experts.{first + int(index)}.{tail}" if rest else name

        load_full(model, {name: weights[whole_name(name)] for name, _ in model.named_parameters()})
        tokens, positions, labels = batch()
        got_loss = model(tokens, positions, None, labels=labels).mean()
        got_loss.backward()
        shared = {n: p for n, p in model.named_parameters() if "experts" not in n and "router" not in n}
        got = {n: unshard(n, p, p.grad) for n, p in shared.items() if p.grad is not None}
    errors = relative_errors(got, {n: gradients[n] for n in shared})
    return {"loss": float((got_loss.detach() - loss).abs() / loss), **errors}


@case
def tp2_sp_full_recompute() -> dict[str, float]:
    return parity(2, True, RECOMPUTE)


@case
def replicated_weights_start_equal_on_all_ranks() -> list[str]:
    """Names of the replicated parameters; `full_weights` raises where tensor-parallel ranks drew different values."""
    with parallel(tp=4):
        config = tiny_config(normalization="LayerNorm")
        sparsek = SparseKConfig(**SPARSEK, scorer="mlp", scorer_norm=True)
        model = build_gpt(config, get_sparsek_layer_spec(config, sparsek=sparsek))
        full_weights(model)
        return [n for n, p in model.named_parameters() if not getattr(p, "tensor_model_parallel", False)]


@case
def covering_selection_against_the_stock_dense_model() -> dict[str, dict[str, float]]:
    """Errors of a SparseK model with topk + window >= s under several splits, the stock model on one rank."""
    with parallel():
        config = tiny_config(params_dtype=torch.float64)
        stock = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm")
        dense = build_gpt(config, stock).double()
        randomise(dense)
        weights = full_weights(dense)
        loss, gradients = loss_and_gradients(dense, batch())
    answer = {}
    for name, (tp, sequence_parallel) in {
        "tp2": (2, False),
        "tp2_sp": (2, True),
        "tp4_sp": (4, True),
    }.items():
        with parallel(tp=tp):
            config = tiny_config(params_dtype=torch.float64, sequence_parallel=sequence_parallel)
            sparsek = SparseKConfig(topk=40, window=24, stride=8)
            model = build_gpt(config, get_sparsek_layer_spec(config, sparsek=sparsek))
            load_full(model, {**full_weights(model), **weights})
            got_loss, got = loss_and_gradients(model, batch())
        scorers = {n: got.pop(n) for n in list(got) if "scorer" in n}
        assert len(scorers) == 4 and not any(g.any() for g in scorers.values())
        answer[name] = {"loss": float((got_loss - loss).abs() / loss), **relative_errors(got, gradients)}
    return answer


@case
def control_without_the_sum_over_ranks() -> dict[str, float]:
    """The same comparison with the reduction taken out: the errors a wrong scorer gradient shows."""
    kept = ScoringNetwork._summed_in_backward
    try:
        ScoringNetwork._summed_in_backward = lambda self, weight: weight  # pyright: ignore
        weights, _, gradients = reference({}, {})
        with parallel(tp=2):
            config = tiny_config(params_dtype=torch.float64, sequence_parallel=True)
            model = build_gpt(config, get_sparsek_layer_spec(config, sparsek=SparseKConfig(**SPARSEK)))
            load_full(model, weights)
            tokens, positions, labels = batch()
            model(tokens, positions, None, labels=labels).mean().backward()
            scorer = {n: p for n, p in model.named_parameters() if "scorer" in n}
            got = {n: p.grad for n, p in scorer.items() if p.grad is not None}
            return relative_errors(got, {n: gradients[n] for n in scorer})
    finally:
        ScoringNetwork._summed_in_backward = kept
