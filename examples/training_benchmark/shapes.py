# SPDX-License-Identifier: Apache-2.0
"""Model shapes of the benchmark, and the work that a training step of one needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A GPT with RMSNorm, SwiGLU, RoPE, grouped queries and untied embeddings; names are Megatron's."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int = 128

    def with_layers(self, count: int | None) -> Shape:
        return self if count is None else dataclasses.replace(self, num_layers=count)

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrix products, the scorer's left out."""
        query = self.num_attention_heads * self.kv_channels
        kv = self.num_query_groups * self.kv_channels
        return self.hidden_size * (2 * query + 2 * kv + 3 * self.ffn_hidden_size)

    def step_flops(self, *, tokens: int, vocabulary: int, pairs: float) -> float:
        """Floating-point operations of forward and backward on one sequence, without what recomputation repeats.

        6 per weight and token, and 12 d per attended (query, key) pair and query head (4 d forward; backward counts
        twice). `pairs` is what the attention definition needs, not what a kernel masks or computes again.
        """
        weights = self.num_layers * self.layer_weights + vocabulary * self.hidden_size
        attention = 12.0 * self.kv_channels * self.num_attention_heads * self.num_layers * pairs
        return 6.0 * weights * tokens + attention


SHAPES = {
    "tiny": Shape(2, 64, 192, 4, 2, 16),  # to try the program without a GPU
    "1.3b": Shape(24, 2048, 5504, 16, 8),
    "3b": Shape(28, 3072, 8192, 24, 8),
    "8b": Shape(32, 4096, 14336, 32, 8),
}


def causal_pairs(tokens: int) -> float:
    """(query, key) pairs of dense causal attention."""
    return tokens * (tokens + 1) / 2


def window_pairs(tokens: int, width: int) -> float:
    """Pairs of a sliding window: each query attends to at most `width` keys."""
    width = min(width, tokens)
    return width * (width + 1) / 2 + (tokens - width) * width
