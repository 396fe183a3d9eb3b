# SPDX-License-Identifier: Apache-2.0
"""Async tensor parallelism is refused in one line where it cannot work or would be slower."""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsek_megatron import async_tensor_parallel
from sparsek_megatron.async_tensor_parallel import use_async_tensor_parallel
from sparsek_megatron.errors import UserError
from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.launcher import order_launches
from sparsek_megatron.training.validate import check_parallelism

CONFIG = TrainingConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=64, train_iters=1)


def model(**changes: Any) -> torch.nn.Module:
    """A model of one layer that is not megatron-core's, as Transformer Engine's are."""
    made = torch.nn.Sequential(torch.nn.Linear(2, 2))
    settings = {
        "tensor_model_parallel_size": 2, "sequence_parallel": True, "num_moe_experts": None,
        "add_bias_linear": False, "gradient_accumulation_fusion": False,
    }  # fmt: skip
    made.config = SimpleNamespace(**{**settings, **changes})  # pyright: ignore
    return made


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"tensor_model_parallel_size": 1}, ValueError, "--tensor-model-parallel-size 1: there is nothing"),
        ({"sequence_parallel": False}, ValueError, "and --sequence-parallel, or leave it out"),
        ({"num_moe_experts": 4}, NotImplementedError, "--num-experts: experts have collectives"),
        ({"add_bias_linear": True}, NotImplementedError, "use --disable-bias-linear"),
        ({"gradient_accumulation_fusion": True}, NotImplementedError, "--no-gradient-accumulation-fusion"),
        ({}, NotImplementedError, "Transformer Engine's overlap with --tp-comm-overlap"),
    ],
)
def test_models_that_it_cannot_serve(changes: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as error:
        use_async_tensor_parallel(model(**changes))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_one_queue_for_all_streams_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with pytest.raises(ValueError, match=r"CUDA_DEVICE_MAX_CONNECTIONS=1: .* unset it"):
        async_tensor_parallel._check_gpus(SimpleNamespace(group_name="tp"))


def test_gpus_that_cannot_share_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import _symmetric_memory

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDASymmetricMemory: no peer access\nC++ stack")

    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    monkeypatch.setattr(_symmetric_memory, "get_symm_mem_workspace", fail)
    with pytest.raises(NotImplementedError, match=r"no peer access\); use GPUs of one host") as error:
        async_tensor_parallel._check_gpus(SimpleNamespace(group_name="tp"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [{}, {"tensor_model_parallel_size": 2}])
def test_the_trainer_asks_for_sequence_parallelism(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, async_tensor_parallel=True, **changes)
    with pytest.raises(UserError, match=r"--async-tensor-parallel: .* add --sequence-parallel"):
        check_parallelism(config, 2)
    check_parallelism(dataclasses.replace(config, tensor_model_parallel_size=2, sequence_parallel=True), 2)


def test_launches_are_not_ordered_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    order_launches(2, in_pieces=True)
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "")  # put back after the test
    del os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]
    order_launches(2)
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
