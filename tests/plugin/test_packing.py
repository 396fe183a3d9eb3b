# SPDX-License-Identifier: Apache-2.0
"""Positions of whole sequences: none without context parallelism, remembered with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sparsek_megatron import packing
from sparsek_megatron.context_parallel import shard_positions
from sparsek_megatron.packing import token_positions

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    packing._shard_positions.cache_clear()
    yield
    packing._shard_positions.cache_clear()


def test_whole_sequences_need_no_positions() -> None:
    assert token_positions(12, None, CPU) is None


def test_a_ranks_positions_are_made_once() -> None:
    first = token_positions(12, None, CPU, cp=2, cp_rank=1)
    assert first is not None and first.tolist() == shard_positions(24, 2, 1).tolist()
    assert token_positions(12, None, CPU, cp=2, cp_rank=1) is first
    other = token_positions(12, None, CPU, cp=2, cp_rank=0)
    assert other is not None and other.tolist() == shard_positions(24, 2, 0).tolist()
    longer = token_positions(16, None, CPU, cp=2, cp_rank=1)
    assert longer is not None and longer.tolist() == shard_positions(32, 2, 1).tolist()


def test_positions_of_an_evaluation_can_be_kept_for_a_later_backward() -> None:
    with torch.inference_mode():
        token_positions(12, None, CPU, cp=2, cp_rank=1)
    again = token_positions(12, None, CPU, cp=2, cp_rank=1)
    assert again is not None and not again.is_inference()


def test_a_capture_neither_reads_nor_leaves_remembered_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = False

    def on_cpu(length: int, cp: int, rank: int, device: torch.device) -> torch.Tensor:
        return shard_positions(length, cp, rank)

    def positions() -> torch.Tensor:
        made = token_positions(12, None, torch.device("cuda"), cp=2, cp_rank=1)
        assert made is not None and made.tolist() == shard_positions(24, 2, 1).tolist()
        return made

    monkeypatch.setattr(packing, "shard_positions", on_cpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    capturing = True
    first = positions()
    capturing = False
    second = positions()
    capturing = True
    third = positions()
    capturing = False
    assert second is not first and third is not second and third is not first
    assert positions() is second
