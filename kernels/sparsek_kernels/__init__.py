# SPDX-License-Identifier: Apache-2.0
"""SparseK attention kernels: the operator, linear-time selection, and the attention built on them."""

from .attention.api import sparsek_attention
from .operator import sparsek
from .selection import Selection, SelectionState, select

__all__ = ["Selection", "SelectionState", "select", "sparsek", "sparsek_attention"]
