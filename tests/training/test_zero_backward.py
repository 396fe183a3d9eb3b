# SPDX-License-Identifier: Apache-2.0
"""What replaces the host's wait at the end of a backward pass, and when; `test_zero_accumulation` runs it on GPUs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from sparsek_megatron.training import zero_backward
from sparsek_megatron.training.zero_backward import (
    _average_tensor,
    _end_backward,
    ends_as_known,
    wait_by_stream,
)


class Known:
    """An optimizer that ends its backward passes as DeepSpeed 0.19.8 does, and notes what it did."""

    def __init__(self, done: list[str]):
        self.done, self.overlap_comm, self.reduction_stream = done, True, "reduction"

    def reduce_ipg_grads(self) -> None:
        self.done.append("reduce")

    def _clear_previous_reduced_grads(self) -> None:
        self.done.append("clear")

    def independent_gradient_partition_epilogue(self) -> None:
        self.reduce_ipg_grads()
        if self.overlap_comm:
            if not get_accelerator().resolves_data_dependency():
                get_accelerator().synchronize()
            # A comment.
            self._clear_previous_reduced_grads()
        self.done.append("rest")


class WaitsTwice(Known):
    def independent_gradient_partition_epilogue(self) -> None:
        self.reduce_ipg_grads()
        if self.overlap_comm:
            if not get_accelerator().resolves_data_dependency():
                get_accelerator().synchronize()
            self._clear_previous_reduced_grads()
        if self.overlap_comm:
            self.done.append("rest")


class DoesMore(Known):
    def independent_gradient_partition_epilogue(self) -> None:
        self.reduce_ipg_grads()
        if self.overlap_comm:
            if not get_accelerator().resolves_data_dependency():
                get_accelerator().synchronize()
            self.done.append("more")
            self._clear_previous_reduced_grads()


def get_accelerator() -> Any:
    raise AssertionError("the host waits")


def test_the_installed_deepspeed_ends_backward_as_known():
    assert ends_as_known(DeepSpeedZeroOptimizer)
    assert ends_as_known(Known) and not ends_as_known(WaitsTwice) and not ends_as_known(DoesMore)


def test_the_compute_stream_waits_between_the_reduction_and_what_frees_its_buffers(monkeypatch):
    done: list[str] = []
    stream = SimpleNamespace(wait_stream=lambda other: done.append(f"wait for {other}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    zero = Known(done)
    _end_backward(zero)
    assert done == ["reduce", "wait for reduction", "clear", "reduce", "rest"]
    assert zero.overlap_comm


@pytest.mark.parametrize(
    ("offload", "overlap", "known"), [(True, True, True), (False, False, True), (False, True, False)]
)
def test_other_ways_keep_the_hosts_wait(monkeypatch, capsys, offload, overlap, known):
    class Stream:
        pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(zero_backward, "ends_as_known", lambda kind: known)
    zero = DeepSpeedZeroOptimizer.__new__(DeepSpeedZeroOptimizer)
    zero.cpu_offload, zero.overlap_comm, zero.reduction_stream = offload, overlap, Stream()
    assert not wait_by_stream(SimpleNamespace(optimizer=zero, global_rank=0))
    assert "independent_gradient_partition_epilogue" not in vars(zero)
    assert capsys.readouterr().out.startswith("this DeepSpeed ends backward otherwise") is not known
    zero.cpu_offload, zero.overlap_comm = False, True
    monkeypatch.setattr(zero_backward, "ends_as_known", lambda kind: True)
    assert wait_by_stream(SimpleNamespace(optimizer=zero, global_rank=0))


def test_memory_of_a_gradient_that_fits_into_no_bucket_is_held_for_the_reduction():
    class Tensor(SimpleNamespace):
        def record_stream(self, stream: Any) -> None:
            done.append(f"hold for {stream}")

    class Zero(Known):
        reduce_bucket_size = 8

        def average_tensor(self, tensor: Any, communication_data_type: Any) -> None:
            done.append("average")

    done: list[str] = []
    for size in (8, 9):
        _average_tensor(Zero(done), Tensor(numel=lambda size=size: size), torch.float32)  # pyright: ignore[reportArgumentType]
    assert done == ["average", "hold for reduction", "average"]
