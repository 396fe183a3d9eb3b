# SPDX-License-Identifier: Apache-2.0
"""SparseK attention for Megatron-core models.

Names are resolved on first use, so that `import sparsek_megatron` needs neither megatron-core nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsek_megatron.attention import SparseKSelfAttention
    from sparsek_megatron.config import SparseKConfig
    from sparsek_megatron.core_attention import SparseKCoreAttention
    from sparsek_megatron.norm import Norm
    from sparsek_megatron.scoring import ScoringNetwork
    from sparsek_megatron.specs import (
        get_sparsek_block_spec,
        get_sparsek_layer_spec,
        get_sparsek_mtp_block_spec,
        sparsek_layer_spec,
    )

_HOME = {
    "SparseKConfig": "config",
    "Norm": "norm",
    "ScoringNetwork": "scoring",
    "SparseKCoreAttention": "core_attention",
    "SparseKSelfAttention": "attention",
    "get_sparsek_block_spec": "specs",
    "get_sparsek_layer_spec": "specs",
    "get_sparsek_mtp_block_spec": "specs",
    "sparsek_layer_spec": "specs",
}

__all__ = [
    "Norm",
    "ScoringNetwork",
    "SparseKConfig",
    "SparseKCoreAttention",
    "SparseKSelfAttention",
    "get_sparsek_block_spec",
    "get_sparsek_layer_spec",
    "get_sparsek_mtp_block_spec",
    "sparsek_layer_spec",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
