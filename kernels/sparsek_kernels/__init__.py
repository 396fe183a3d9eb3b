# SPDX-License-Identifier: Apache-2.0
"""SparseK attention kernels: the operator, linear-time selection, and the attention built on them."""

from .attention.api import sparsek_attention
from .attention.chunk import AttentionState, sparsek_attention_chunk
from .cache import SparseKCache
from .operator import sparsek
from .selection import Selection, SelectionState, select

__all__ = [
    "AttentionState",
    "Selection",
    "SelectionState",
    "SparseKCache",
    "select",
    "sparsek",
    "sparsek_attention",
    "sparsek_attention_chunk",
]
