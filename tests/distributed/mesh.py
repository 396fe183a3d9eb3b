# SPDX-License-Identifier: Apache-2.0
"""One model on one rank and on a mesh of ranks: loss, every gradient, and the selections of every layer.

Selection is discontinuous (two scores that tie within rounding may swap when a product's shape changes), so gradients
are comparable only where the selections are equal. Scores are recorded on their way into attention, put together over
ranks, and what they select is compared first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from mcore_harness import (
    VOCAB,
    build_gpt,
    device,
    full_weights,
    load_full,
    packed,
    parallel,
    randomise,
    relative_errors,
    tiny_config,
    unshard,
)
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from sparsek_kernels import select

from sparsek_megatron import SparseKConfig, SparseKCoreAttention, get_sparsek_layer_spec
from sparsek_megatron.context_parallel import shard_positions

# Large enough on a GPU to cross tiles and segments of the compiled kernels.
SCALE = 16 if torch.cuda.is_available() else 1
LENGTH = 96 * SCALE
SPARSEK: dict[str, Any] = {"topk": 6, "window": 7, "stride": 8, "pool": 20, "reference_length": 128 * SCALE}
HEAD_DIM = 8
if torch.cuda.is_available():
    SPARSEK |= {"topk": 48, "window": 56, "stride": 64, "pool": 160}
    HEAD_DIM = 64


def global_batch(size: int, length: int, seed: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens and labels [size, length], the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(0, VOCAB, (size, length), generator=generator) for _ in range(2))
    return tokens.to(device()), labels.to(device())


@contextlib.contextmanager
def recorded_scores() -> Iterator[tuple[list[torch.Tensor], dict[int, torch.Tensor]]]:
    """Scores [b, s, heads] of each core attention call of this rank, in order; their gradients by the call's number,
    after backward, where the call was not one of recompute's first.
    """
    kept: list[torch.Tensor] = []
    gradients: dict[int, torch.Tensor] = {}
    forward = SparseKCoreAttention.forward

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        scores, call = kwargs["attention_bias"], len(kept)
        kept.append(scores.detach())
        if scores.requires_grad:
            scores.register_hook(lambda gradient: gradients.update({call: gradient.double()}))
        return forward(self, *args, **kwargs)

    SparseKCoreAttention.forward = recording
    try:
        yield kept, gradients
    finally:
        SparseKCoreAttention.forward = forward


def local_order(length: int, bounds: list[int] | None) -> torch.Tensor:
    """Positions in the (packed) sequence of this context-parallel rank's tokens."""
    cp, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    edges = bounds or [0, length]
    if cp == 1:
        return torch.arange(length, device=device())
    parts = [a + shard_positions(b - a, cp, rank) for a, b in pairwise(edges)]
    return torch.cat(parts).to(device())


def _gather(x: torch.Tensor, group: Any) -> list[torch.Tensor]:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


def whole_scores(scores: torch.Tensor, order: torch.Tensor, kv_heads: int, size: int) -> torch.Tensor:
    """[size, s, all KV heads] of the global batch from this rank's [b, s / cp, heads / tp]."""
    tp, cp = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group()
    heads = torch.cat(_gather(scores, tp), dim=-1)[..., :: max(1, tp.size() // kv_heads)]
    out = heads.new_empty((heads.shape[0], heads.shape[1] * cp.size(), heads.shape[2]))
    for part, where in zip(_gather(heads, cp), _gather(order, cp), strict=True):
        out[:, where] = part
    return torch.cat(_gather(out, parallel_state.get_data_parallel_group()))[:size]


def global_name(name: str, config: Any) -> str:
    """A parameter's name with an expert's global index in place of its index on this rank."""
    head, _, rest = name.partition(".local_experts.")
    if not rest or config.expert_model_parallel_size == 1:
        return name
    index, _, tail = rest.partition(".")
    first = parallel_state.get_expert_model_parallel_rank() * (
        config.num_moe_experts // config.expert_model_parallel_size
    )
    return f"{head}.local_experts.{first + int(index)}.{tail}"


def gather_gradient(name: str, parameter: torch.nn.Parameter, loose: float) -> torch.Tensor:
    """Whole gradient of the mean loss over the global batch; experts' gradients stay with their rank."""
    gradient = parameter.grad
    assert gradient is not None, f"no gradient for {name}"
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if not getattr(parameter, "allreduce", True):
        group = parallel_state.get_expert_data_parallel_group()
    total = gradient.clone()
    dist.all_reduce(total, group=group)
    return unshard(name, parameter, total, tolerance=loose)


def packed_sequences(bounds: list[int], padding: int) -> PackedSeqParams:
    """THD parameters of sequences between `bounds`, of which the last `padding` tokens of each are padding."""
    lengths = [b - a for a, b in pairwise(bounds)]
    made = packed([n - padding for n in lengths], lengths if padding else None)
    for name in ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"):
        boundaries = getattr(made, name)
        setattr(made, name, None if boundaries is None else boundaries.to(device()))
    return made


def run(
    *, size: int = 4, length: int = LENGTH, weights: dict[str, torch.Tensor] | None = None, seed: int = 17,
    bounds: list[int] | None = None, padding: int = 0, dtype: torch.dtype = torch.float32,
    sparsek: dict[str, Any] | None = None, **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """Loss, whole gradients, scores of each layer and whole weights, on the groups that are set up. Also the magnitudes
    that this rank's terms of each slope's gradient add up to, [heads].

    bounds: of packed sequences; padding: of the last tokens of each, which have no loss.
    """
    dp, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    config = tiny_config(params_dtype=dtype, bf16=dtype == torch.bfloat16, kv_channels=HEAD_DIM, **changes)
    model = build_gpt(
        config, get_sparsek_layer_spec(config, sparsek=SparseKConfig(**{**SPARSEK, **(sparsek or {})}))
    )
    model.to(device())
    if weights is None:
        randomise(model)
        weights = full_weights(model)
    else:
        load_full(model, {n: weights[global_name(n, config)] for n, _ in model.named_parameters()})
    tokens, labels = global_batch(size, length, seed)
    order = local_order(length, bounds)
    copies = dp if size < dp else 1  # a packed batch has one row: data-parallel ranks then share the same
    mine = slice(dp_rank * size // dp, (dp_rank + 1) * size // dp) if copies == 1 else slice(size)
    tokens, labels = tokens[mine][:, order], labels[mine][:, order]
    sequences = None if bounds is None else packed_sequences(bounds, padding)
    counted = torch.ones(length, device=device())
    for end in bounds[1:] if bounds and padding else []:
        counted[end - padding : end] = 0
    with recorded_scores() as (kept, score_gradients):
        losses = model(tokens, order.expand_as(tokens), None, labels=labels, packed_seq_params=sequences)
        loss = (losses.float() * counted[order]).sum() / (size * length * copies)
        loss.backward()
    layers = config.num_layers
    scores = [
        whole_scores(x, order, config.num_query_groups, size) for x in kept[:layers]
    ]  # recompute calls again
    total = loss.detach().clone()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    loose = 1e-9 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 3e-2
    gradients = {
        global_name(n, config): gather_gradient(n, p, loose).float() for n, p in model.named_parameters()
    }
    stages: list[Any] = [None] * config.expert_model_parallel_size
    if len(stages) > 1:  # every rank has its own experts
        dist.all_gather_object(stages, gradients, group=parallel_state.get_expert_model_parallel_group())
        gradients = {n: g.to(device()) for stage in stages for n, g in stage.items()}
    relative = torch.cat([torch.arange(b - a, device=device()) for a, b in pairwise(bounds or [0, length])]).double()
    relative /= {**SPARSEK, **(sparsek or {})}["reference_length"]
    terms = {
        f"decoder.layers.{call}.self_attention.scorer.slope": (x.abs() * relative[order][:, None]).sum((0, 1))
        for call, x in score_gradients.items()
    }
    return {"loss": float(total), "gradients": gradients, "terms": terms, "scores": scores, "weights": weights}


def different_selections(got: list[torch.Tensor], want: list[torch.Tensor], sparsek: dict[str, Any]) -> int:
    """Keys whose eviction differs between two runs' scores, over all layers."""
    settings = {name: {**SPARSEK, **sparsek}[name] for name in ("topk", "window", "stride", "pool")}
    pairs = zip(got, want, strict=True)
    return sum(
        int((select(a.float(), **settings).evict != select(b.float(), **settings).evict).sum())
        for a, b in pairs
    )


def without_rounding(got: torch.Tensor, want: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
    """`got`, as much nearer to `want` as the terms of their sums are rounded in fp32, four times each.

    A slope's gradient is the sum over tokens of score gradient times position, and gradients of scores that share a
    threshold sum to zero: on GPUs' sizes it is 1/75 to 1/340 of what its terms' magnitudes (`terms`) add up to. A
    tolerance of 1e-5 is then one of 2.8e-5 to 9.1e-5 for slopes; it was half a rounding to two of each term.
    """
    off = got.double() - want.double()
    return want.double() + off.sign() * (off.abs() - terms * 2**-22).clamp(min=0)


def compare(
    got: dict[str, Any], want: dict[str, Any], sparsek: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Errors of a mesh's `run` against one rank's, whose `terms` are those of the whole batch."""
    nearer = {
        name: without_rounding(got["gradients"][name], want["gradients"][name], terms)
        for name, terms in want["terms"].items()
    }
    return {
        "loss": abs(got["loss"] - want["loss"]) / want["loss"],
        "gradients": relative_errors(got["gradients"] | nearer, want["gradients"]),
        "different_selections": different_selections(got["scores"], want["scores"], sparsek or {}),
        "selections": sum(x.numel() for x in want["scores"]),
    }


_references: dict[str, dict[str, Any]] = {}


def parity(
    *, tp: int = 1, cp: int = 1, ep: int = 1, mesh: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """A mesh (tp, cp, ep, and data parallel over what is left) against one rank: errors, keys selected differently.

    mesh: changes of the configuration on the mesh only. References of equal settings are computed once.
    """
    key = repr(sorted(settings.items(), key=lambda item: item[0]))
    if key not in _references:
        with parallel(), single_data_parallel_rank():
            _references[key] = run(**settings)
    want = _references[key]
    with parallel(tp=tp, cp=cp, ep=ep):
        got = run(weights=want["weights"], **settings, **(mesh or {}))
    return compare(got, want, settings.get("sparsek"))


@contextlib.contextmanager
def single_data_parallel_rank() -> Iterator[None]:
    """Groups of one for data parallelism, so that each rank computes the whole batch."""
    own = _own_group()
    names = (
        "get_data_parallel_world_size",
        "get_data_parallel_rank",
        "get_data_parallel_group",
        "get_expert_data_parallel_group",
    )
    kept = {name: getattr(parallel_state, name) for name in names}
    parallel_state.get_data_parallel_world_size = lambda **_: 1
    parallel_state.get_data_parallel_rank = lambda **_: 0
    parallel_state.get_data_parallel_group = lambda **_: own
    parallel_state.get_expert_data_parallel_group = lambda **_: own
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(parallel_state, name, function)


_groups: list[Any] = []


def _own_group() -> Any:
    if not _groups:
        every = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        _groups.append(every[dist.get_rank()])
    return _groups[0]
