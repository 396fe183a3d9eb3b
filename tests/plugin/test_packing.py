# SPDX-License-Identifier: Apache-2.0
"""Positions of whole sequences: none without context parallelism, the rank's own with it."""

from __future__ import annotations

import torch

from sparsek_megatron.context_parallel import shard_positions
from sparsek_megatron.packing import token_positions

CPU = torch.device("cpu")


def test_whole_sequences_need_no_positions() -> None:
    assert token_positions(12, None, CPU) is None


def test_a_ranks_positions_are_those_of_its_shard() -> None:
    for rank in (0, 1):
        positions = token_positions(12, None, CPU, cp=2, cp_rank=rank)
        assert positions is not None and positions.tolist() == shard_positions(24, 2, rank).tolist()
