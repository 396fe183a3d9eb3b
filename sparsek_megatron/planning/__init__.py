# SPDX-License-Identifier: Apache-2.0
"""A cost model of training with SparseK attention on many GPUs, and the search for a layout with it."""

from sparsek_megatron.planning.cost import Cost, estimate
from sparsek_megatron.planning.search import Plan, best_layout
from sparsek_megatron.planning.shapes import H200, MODELS, Layout, Machine, Model, Run

__all__ = ["H200", "MODELS", "Cost", "Layout", "Machine", "Model", "Plan", "Run", "best_layout", "estimate"]
