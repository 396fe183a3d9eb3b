# SPDX-License-Identifier: Apache-2.0
"""Packed (THD) sequences: their boundaries, and the position of every token in its sequence."""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from sparsek_megatron.context_parallel import shard_positions


def packed_boundaries(packed: PackedSeqParams | None) -> Tensor | None:
    """cu_seqlens int32 [num_seqs + 1] of packed sequences, the padded ones where given; None if not packed.

    Raises NotImplementedError for a format other than "thd" and ValueError where queries and keys differ.
    """
    if packed is None:
        return None
    if packed.qkv_format != "thd":
        raise NotImplementedError(f"packed_seq_params.qkv_format={packed.qkv_format!r}: use 'thd'")
    boundaries = packed.cu_seqlens_q_padded if packed.cu_seqlens_q_padded is not None else packed.cu_seqlens_q
    keys = packed.cu_seqlens_kv_padded if packed.cu_seqlens_kv_padded is not None else packed.cu_seqlens_kv
    if boundaries is None:
        raise ValueError("packed_seq_params.cu_seqlens_q is None: give the sequence boundaries")
    if keys is not None and keys is not boundaries and keys.shape != boundaries.shape:
        raise ValueError(
            f"packed_seq_params: {boundaries.numel() - 1} query sequences against {keys.numel() - 1} of "
            "keys; self attention needs the same boundaries for both"
        )
    return boundaries.to(torch.int32)


def check_packed_batch(boundaries: Tensor, *, rows: int, tokens: int) -> None:
    """Refuse packed sequences that are not those of a batch of `rows` rows of `tokens` tokens over all ranks.

    Boundaries are read where they are on the CPU: elsewhere that would wait for the device.

    Raises ValueError naming what does not fit.
    """
    if rows != 1:
        raise ValueError(
            f"packed_seq_params with a batch of {rows} rows: pack all sequences into one (--micro-batch-size 1)"
        )
    if not boundaries.is_cuda and int(boundaries[-1]) > tokens:
        raise ValueError(
            f"packed_seq_params: the last sequence ends at token {int(boundaries[-1])} of {tokens}; give the "
            "boundaries of this batch"
        )


def token_positions(
    length: int, boundaries: Tensor | None, device: torch.device, *, cp: int = 1, cp_rank: int = 0
) -> Tensor | None:
    """Position of each of this rank's tokens [length], restarting at each packed sequence; no synchronisation.

    None for 0 ... length - 1: whole sequences. boundaries int32 [num_seqs + 1] are global. Under context parallelism
    every sequence is sharded on its own, in Megatron's zigzag layout.
    """
    if boundaries is None:
        if cp == 1:
            return None
        return shard_positions(length * cp, cp, cp_rank, device=device)
    index = torch.arange(length, device=device)
    starts = boundaries.to(index.dtype) // cp
    sequence = (torch.searchsorted(starts, index, right=True) - 1).clamp(0, starts.numel() - 2)
    place = index - starts[sequence]
    if cp == 1:
        return place
    chunk = starts.diff()[sequence] // 2
    return torch.where(place < chunk, cp_rank * chunk + place, (2 * cp - 2 - cp_rank) * chunk + place)
