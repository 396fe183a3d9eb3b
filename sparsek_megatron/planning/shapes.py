# SPDX-License-Identifier: Apache-2.0
"""What the cost model is given: a model's shape, a cluster, a run, and a layout of ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A GPT with grouped-query attention, SwiGLU and SparseK attention in every layer, bf16."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    vocabulary: int = 128_256
    topk: int = 512
    window: int = 512
    stride: int = 64
    pool: int = 2048

    @property
    def layer_parameters(self) -> int:
        """Weights of the matrix products of one layer; norms and the scorer are left out (below 0.1 %)."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.ffn

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + 2 * self.vocabulary * self.hidden

    @property
    def recent(self) -> int:
        """Tokens of a chunk's halo."""
        return self.window + self.stride - 1

    def attended(self, tokens: int) -> float:
        """Keys that a query attends to, on average over a sequence of `tokens`."""
        full = self.topk + self.window + self.stride / 2
        return (tokens + 1) / 2 if tokens <= full else full - full**2 / (2 * tokens)


# Shapes of Llama 2 7B with the grouped heads of its successors, Llama 3 70B and 405B.
MODELS = {
    "7B": Model(layers=32, hidden=4096, ffn=14_336, heads=32, kv_heads=8),
    "70B": Model(layers=80, hidden=8192, ffn=28_672, heads=64, kv_heads=8),
    "405B": Model(layers=126, hidden=16_384, ffn=53_248, heads=128, kv_heads=8),
}


@dataclass(frozen=True)
class Machine:
    """A cluster of equal nodes.

    peak              bf16 matrix products of one GPU, FLOP/s
    matmul            fraction of it that a layer's matrix products reach (calibrated: `calibrate`)
    attention_forward, attention_backward  useful FLOP/s of the attention kernels (kernels/benchmarks/README.md)
    memory            bytes of one GPU that training may fill
    node              GPUs that share the fast link
    fast, slow        bytes/s that one GPU receives within a node (calibrated), and from other nodes
    exchange          seconds that each collective of a context-parallel exchange takes beside its bytes, with the small
                      kernels around it and the wait for the other ranks (calibrated)
    latency           the same of every other collective
    """

    peak: float
    matmul: float
    attention_forward: float
    attention_backward: float
    memory: float
    node: int
    fast: float
    slow: float
    exchange: float
    latency: float = 2e-5


# Peak and memory from the data sheet; attention measured; `matmul`, `fast` and `exchange` as
# `examples/plan_parallelism.py --calibrate examples/results/scaling.csv` fits them, to four digits (their errors:
# examples/benchmark_scaling.md). `slow` and `latency` are assumptions.
H200 = Machine(
    peak=989e12,
    matmul=0.555,
    attention_forward=304e12,
    attention_backward=236e12,
    memory=0.9 * 141e9,
    node=8,
    fast=303.9e9,
    slow=40e9,
    exchange=1.632e-3,
)


@dataclass(frozen=True)
class Run:
    """A training step: sequences of `tokens` tokens, `batch_tokens` of them all together."""

    tokens: int
    batch_tokens: int

    @property
    def sequences(self) -> int:
        return max(1, self.batch_tokens // self.tokens)


@dataclass(frozen=True)
class Layout:
    """Ranks: tensor (with sequence parallelism), context, pipeline, data parallel; ZeRO stage 1 or 3 over dp * cp."""

    tp: int
    cp: int
    pp: int
    dp: int
    zero: int = 1
    recompute: bool = True

    @property
    def gpus(self) -> int:
        return self.tp * self.cp * self.pp * self.dp
