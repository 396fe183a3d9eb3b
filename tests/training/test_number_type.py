# SPDX-License-Identifier: Apache-2.0
"""Resuming in another number type, or on another device: what fits, what is refused in which words, RNG states."""

import dataclasses
import json

import pytest
import torch
from megatron.core import tensor_parallel

from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.errors import UserError
from sparsek_megatron.training.manifest import record_of, write_manifest
from sparsek_megatron.training.rng import restore_rng, rng_states
from sparsek_megatron.training.run_folder import check_resume, same_layout


@pytest.fixture
def saved(config, prepared, tmp_path):
    """Returns a function: the run of a checkpoint with some settings, `run.json` beside it, to be resumed."""

    def save(number_type, **settings):
        run = dataclasses.replace(config, save=str(tmp_path), load=str(tmp_path), **settings)
        step = tmp_path / "step_00000003"
        step.mkdir(exist_ok=True)
        record = dataclasses.asdict(run) | {n: getattr(run, n) for n in ("mlp_width", "query_groups", "head_dim")}
        content = {"step": 3, "world_size": 1, "settings": record}
        content["tokenizer_sha256"] = SentencePieceTokenizer.load(prepared.tokenizer).sha256
        content |= {"number_type": number_type} if number_type else {}
        (step / "run.json").write_text(json.dumps(content))
        (tmp_path / "latest").write_text(step.name)
        write_manifest(step, {"run.json": record_of(step / "run.json")})
        return run, content

    return save


def resume(run, prepared, **settings):
    return check_resume(dataclasses.replace(run, **settings), 1, SentencePieceTokenizer.load(prepared.tokenizer))


@pytest.mark.parametrize("stage", [0, 3])
def test_zero_0_and_3_are_refused_in_another_number_type(saved, prepared, stage):
    run, _ = saved("fp32", zero_stage=stage)
    assert resume(run, prepared, bf16=False) == 3
    says = rf"its number type \(--\[no-\]bf16\) is fp32, this run's is bf16\. .*ZeRO-{stage} hold.*: use --no-bf16$"
    with pytest.raises(UserError, match=says):
        resume(run, prepared, bf16=True)
    run, _ = saved("bf16", zero_stage=stage)
    with pytest.raises(UserError, match=r"is bf16, this run's is fp32.*: use --bf16 on a GPU$"):
        resume(run, prepared, bf16=False)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_change_the_number_type_as_they_change_the_layout(saved, prepared, stage):
    run, content = saved("fp32", zero_stage=stage)
    for bf16 in (False, True):
        assert resume(run, prepared, bf16=bf16) == 3
        assert same_layout(dataclasses.replace(run, bf16=bf16), 1, content) is not bf16


def test_without_the_flag_the_device_decides(saved, monkeypatch):
    run, content = saved("fp32")
    for on_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda on_gpu=on_gpu: on_gpu)
        assert same_layout(run, 1, content) is not on_gpu


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_checkpoint_of_an_older_version_says_no_number_type_and_resumes(saved, prepared, stage):
    run, content = saved(None, zero_stage=stage)
    for bf16 in (False, True):
        assert resume(run, prepared, bf16=bf16) == 3
        assert same_layout(dataclasses.replace(run, bf16=bf16), 1, content)


def test_generators_of_another_device_are_left_as_they_were_seeded(machine):
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = rng_states(on_gpu=False)
    drawn = torch.rand(3)
    with tracker.fork():
        torch.rand(3)
    seeded = tracker.get_states()
    for other, on_gpu in ((states, True), (states | {"cuda": torch.zeros(16, dtype=torch.uint8)}, False)):
        restore_rng(other, on_gpu=on_gpu)
        assert torch.equal(torch.rand(3), drawn)
        assert all(torch.equal(state, seeded[name]) for name, state in tracker.get_states().items())
    restore_rng(states, on_gpu=False)
    now = tracker.get_states()
    assert all(torch.equal(state, now[name]) for name, state in states["tracker"].items())
    assert any(not torch.equal(state, now[name]) for name, state in seeded.items())
