# SPDX-License-Identifier: Apache-2.0
"""Context parallelism for SparseK attention: tokens sharded over ranks, traffic independent of sequence length."""

from sparsek_megatron.context_parallel.agreement import (
    check_agreement,
    check_agreement_with_the_first,
    check_first_layer,
)
from sparsek_megatron.context_parallel.attention import context_parallel_attention
from sparsek_megatron.context_parallel.layout import LAYOUTS, gather_sequence, shard_positions, shard_sequence

__all__ = [
    "LAYOUTS",
    "check_agreement",
    "check_agreement_with_the_first",
    "check_first_layer",
    "context_parallel_attention",
    "gather_sequence",
    "shard_positions",
    "shard_sequence",
]
