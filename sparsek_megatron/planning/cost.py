# SPDX-License-Identifier: Apache-2.0
"""Time, traffic and memory of one training step of one rank, from first principles and a few measured constants.

Everything is counted for one rank. Communication is not overlapped with computation: an upper bound of its cost, and
what the context-parallel exchange does. Pipelines run 1F1B without interleaving.

Not modelled: stragglers, congestion of the network, checkpoints, data loading, and recompute other than "full".
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsek_megatron.planning.shapes import Layout, Machine, Model, Run

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Cost:
    """Seconds of a step by cause, bytes received in it by cause, and bytes of memory at its peak, of one rank."""

    compute: float
    bubble: float
    tensor: float
    context: float
    pipeline: float
    data: float
    received: dict[str, float]
    weights_and_optimizer: float
    activations: float

    @property
    def seconds(self) -> float:
        return self.compute + self.bubble + self.tensor + self.context + self.pipeline + self.data

    @property
    def memory(self) -> float:
        return self.weights_and_optimizer + self.activations


def layer_flops(model: Model, tokens: int) -> tuple[float, float]:
    """(FLOPs of the matrix products, FLOPs of attention) of one layer's forward for a whole sequence."""
    attention = 4.0 * model.heads * model.head_dim * model.attended(tokens) * tokens
    return 2.0 * model.layer_parameters * tokens, attention


def context_bytes(model: Model, tp: int, cp: int) -> tuple[float, float]:
    """Bytes a rank receives for one sequence and layer, forward and backward: a constant, whatever its length.

    Chunks are taken to be longer than the halo, the halos of both of a rank's chunks to come from other ranks.
    """
    if cp == 1:
        return 0.0, 0.0
    heads = max(model.kv_heads // tp, 1)
    others = 2 * cp - 2
    row = 2 * model.head_dim * BF16
    rows = others * model.topk * row + 2 * model.recent * row
    summaries = others * (8 * model.pool + FP32 * model.recent)
    gradients = others * FP32 * (model.pool + model.recent)
    return heads * (rows + summaries), heads * (rows + gradients)


def tensor_bytes(model: Model, tokens: float, tp: int, *, recompute: bool) -> float:
    """Bytes a rank receives for one layer, forward and backward, of `tokens` tokens under sequence parallelism."""
    if tp == 1:
        return 0.0
    passes = 4 + 6 + (4 if recompute else 0)  # backward gathers the inputs of two products again
    scores = 2 * tokens * model.kv_heads * FP32
    return (tp - 1) / tp * (passes * tokens * model.hidden * BF16 + scores)


def state_bytes(model: Model, layout: Layout) -> float:
    """Weights (bf16), gradients (fp32) and optimizer (fp32 copy, two moments) of one rank."""
    own = model.parameters / (layout.tp * layout.pp)
    sharers = layout.dp * layout.cp
    weights = own * BF16 / (sharers if layout.zero == 3 else 1)
    gradients = own * FP32 / (sharers if layout.zero >= 2 else 1)
    return weights + gradients + own * 3 * FP32 / sharers


def activation_bytes(model: Model, run: Run, layout: Layout) -> float:
    """Inputs of all layers kept for backward, and what one layer's recomputed forward and backward hold."""
    local = run.tokens / layout.cp
    shard = local / layout.tp
    in_flight = min(layout.pp, max(1, run.sequences // layout.dp))
    kept = model.layers / layout.pp * in_flight * shard * model.hidden * BF16
    width = model.head_dim * (2 * model.heads + 4 * model.kv_heads) / layout.tp
    working = local * BF16 * (6 * model.hidden + 2 * width + 7 * model.ffn / layout.tp)
    if layout.recompute:
        return kept + working
    stored = 4 * model.hidden / layout.tp + width + 4 * model.ffn / layout.tp
    return working + model.layers / layout.pp * in_flight * local * BF16 * stored


def estimate(model: Model, run: Run, layout: Layout, machine: Machine) -> Cost:
    """Cost of one optimizer step.

    Raises ValueError for a layout that the model or the run does not divide by.
    """
    _check(model, run, layout)
    micro_batches = run.sequences / layout.dp
    layers = model.layers / layout.pp
    products, attention = (x / (layout.tp * layout.cp) for x in layer_flops(model, run.tokens))
    forwards = 2 if layout.recompute else 1
    per_layer = (forwards + 2) * products / (machine.peak * machine.matmul)
    per_layer += attention * (forwards / machine.attention_forward + 2.5 / machine.attention_backward)
    head = 6.0 * model.vocabulary * model.hidden * run.tokens / (layout.tp * layout.cp)
    compute = micro_batches * (layers * per_layer + head / (machine.peak * machine.matmul) / layout.pp)

    local = run.tokens / layout.cp
    tensor = micro_batches * layers * tensor_bytes(model, local, layout.tp, recompute=layout.recompute)
    forward, backward = context_bytes(model, layout.tp, layout.cp)
    context = micro_batches * layers * (forwards * forward + backward)
    pipeline = 2 * micro_batches * local / layout.tp * model.hidden * BF16 if layout.pp > 1 else 0.0
    sharers = layout.dp * layout.cp
    own = model.parameters / (layout.tp * layout.pp)
    once = own * (FP32 + BF16) if layout.zero < 3 else own * (FP32 + 2 * BF16) * micro_batches
    data = once * (sharers - 1) / sharers

    def seconds(size: float, span: int, collectives: float, each: float = machine.latency) -> float:
        """Of `size` bytes over groups that reach over `span` neighbouring GPUs."""
        return size / (machine.fast if span <= machine.node else machine.slow) + collectives * each

    inner = layout.tp * layout.cp
    calls = micro_batches * layers
    return Cost(
        compute=compute,
        bubble=compute * (layout.pp - 1) / micro_batches,
        tensor=seconds(tensor, layout.tp, 14 * calls) if layout.tp > 1 else 0.0,
        context=seconds(context, inner, 3 * (forwards + 1) * calls, machine.exchange)
        if layout.cp > 1
        else 0.0,
        pipeline=seconds(pipeline, layout.gpus, 4 * micro_batches) if layout.pp > 1 else 0.0,
        data=seconds(data, layout.gpus, 2 * layers) if sharers > 1 else 0.0,
        received={"tensor": tensor, "context": context, "pipeline": pipeline, "data": data},
        weights_and_optimizer=state_bytes(model, layout),
        activations=activation_bytes(model, run, layout),
    )


def _check(model: Model, run: Run, layout: Layout) -> None:
    for name, whole, part in (
        ("kv_heads", model.kv_heads, layout.tp),
        ("layers", model.layers, layout.pp),
        ("tokens", run.tokens, 2 * layout.cp if layout.cp > 1 else 1),
        ("sequences per step", run.sequences, layout.dp),
    ):
        if whole % part:
            raise ValueError(f"{layout}: {name} = {whole} is not divisible by {part}")
    if layout.zero == 3 and layout.pp > 1:
        raise ValueError(f"{layout}: ZeRO-3 runs without a pipeline; use zero=1 or pp=1")
