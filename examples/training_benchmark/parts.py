# SPDX-License-Identifier: Apache-2.0
"""Which part of a training step a kernel belongs to.

It is the innermost operation around its launch that says so: a range recorded around a module's forward (again inside
recomputation), or the name of an autograd node in backward. A collective is `exchange` where attention launched it
(context parallelism's keys, halo and gradients), else `communication`. So is what symmetric memory does beside a
matrix product (async tensor parallelism): copies, barriers, sums.
"""

from __future__ import annotations

import re

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

PARTS = (
    "scoring", "selection", "attention", "exchange", "linear", "loss", "norm", "communication", "offload",
    "optimizer", "other",
)  # fmt: skip
ATTENTION = ("scoring", "selection", "attention", "exchange")  # what another attention would not need

_COLLECTIVE = re.compile(r"nccl")
_IN_PIECES, _PRODUCT = re.compile(r"symm_mem::fused"), re.compile(r"aten::mm\b")
# Other kernels that say what they are, wherever they were launched.
_KERNELS = (
    ("offload", r"^Memcpy (HtoD|DtoH)"),
    ("scoring", r"_linear_score_kernel"),
    ("selection", r"^(sequence_table|sort_blocks|scan_lists|add_carries|prepare_blocks|walk|intervals|slot_means"
                  r"|block_prefix|key_gradient)\b"),
)  # fmt: skip
# Ranges and autograd nodes, matched against the operations around a launch from the innermost outwards.
_RANGES = (
    ("scoring", r"^part:scoring|_(LinearScore|PositionScores)Backward"),
    ("selection", r"sparsek::(select|score)"),
    (
        "attention",
        r"^part:attention|sparsek::attention|ScaledDotProduct\w*AttentionBackward|[Ff]lex_?[Aa]ttention"
        r"|StartFromEarlierChunksBackward|_AllToAllBackward",
    ),
    ("loss", r"^part:loss|CrossEntropy\w*Backward"),
    ("linear", r"^part:linear|LinearWithGradAccumulation\w*Backward|Async(Column|Row)Backward"),
    ("norm", r"^part:norm|(Rms|Layer)_?Norm\w*Backward"),
    ("optimizer", r"^part:optimizer"),
)


def part_of_module(name: str, module: torch.nn.Module) -> str | None:
    """Which part a module's forward is, None for one that only holds others."""
    kind = type(module).__name__
    if kind == "ScoringNetwork":
        return "scoring"
    if name.endswith("core_attention"):
        return "attention"
    if name.endswith("output_layer"):
        return "loss"
    if isinstance(module, (ColumnParallelLinear, RowParallelLinear)) or (
        kind.startswith("TE") and "Linear" in kind
    ):
        return "linear"
    return "norm" if "Norm" in kind else None


def part_of_kernel(name: str, around: tuple[str, ...]) -> str:
    """The part of a kernel from its name and the operations around its launch, innermost first."""
    if _COLLECTIVE.search(name):
        return "exchange" if _part_of_range(around) in ATTENTION else "communication"
    if any(_IN_PIECES.search(operation) for operation in around):
        return "linear" if any(_PRODUCT.search(operation) for operation in around) else "communication"
    for part, pattern in _KERNELS:
        if re.search(pattern, name):
            return part
    return _part_of_range(around)


def _part_of_range(around: tuple[str, ...]) -> str:
    for operation in around:
        for part, pattern in _RANGES:
            if re.search(pattern, operation):
                return part
    return "other"
