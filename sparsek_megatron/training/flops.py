# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a training step, with attention counted at its real, sparse cost; MFU from them."""

import re

import torch

from sparsek_megatron.training.arguments import TrainingConfig

# Dense bfloat16 matmul peaks in TFLOP/s, from NVIDIA's data sheets; the first name whose words the device's has counts.
PEAK_TFLOPS = {
    "B200": 2250.0, "H200 NVL": 835.5, "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0,
    "GH200": 989.0, "A100": 312.0,
}  # fmt: skip


def mean_attended_keys(length: int, *, topk: int, window: int, stride: int) -> float:
    """Keys that a query attends to, averaged over a sequence: its local ones and up to `topk` selected ones."""
    query = torch.arange(length)
    first_local = (query // stride * stride - window + 1).clamp(min=0)
    return float((query - first_local + 1 + first_local.clamp(max=topk)).double().mean())


def flops_per_token(config: TrainingConfig, padded_vocab_size: int) -> float:
    """Operations of forward and backward for one token, without recomputation: three times the forward's.

    A multiplication and an addition count as two. Matmuls of projections, MLP, scorer and output layer; attention's
    query-key and weight-value products over the keys that a query really attends to.
    """
    hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
    kv_width = config.query_groups * config.head_dim
    projections = hidden * (2 * width + 2 * kv_width) + 3 * hidden * config.mlp_width + hidden * config.query_groups
    keys = mean_attended_keys(
        config.seq_length, topk=config.sparsek_topk, window=config.sparsek_window, stride=config.sparsek_stride
    )
    layer = 2 * projections + 4 * width * keys
    return 3 * (config.num_layers * layer + 2 * hidden * padded_vocab_size)


def peak_tflops(device_name: str) -> float | None:
    """Dense bfloat16 peak of a GPU by its name; None where it is not known."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)
