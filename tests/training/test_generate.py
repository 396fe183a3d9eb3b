# SPDX-License-Identifier: Apache-2.0
"""`generate.py`: checkpoints of any TP size, damaged ones passed over, prompts, one-line refusals, and a run of it."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from programs import LONGEST_SECONDS, REPOSITORY, environment, kill_all

from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.errors import UserError
from sparsek_megatron.inference_model import ModelDecoder
from sparsek_megatron.inference_weights import load_weights
from sparsek_megatron.training.generate import generate_program, read_prompts
from sparsek_megatron.training.manifest import record_of, write_manifest
from sparsek_megatron.training.model import build_model
from sparsek_megatron.training.reshard import cut_shard
from sparsek_megatron.training.sampling import generate
from sparsek_megatron.training.text_stream import TextStream
from sparsek_megatron.training.trained_run import TrainedRun, generation_config, newest_with_weights, open_run


@pytest.fixture(scope="module")
def checkpoint(config, model, prepared, tmp_path_factory):
    """A run's folder whose weights are `model`, as saved by two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("run")
    step = folder / "step_00000003"
    step.mkdir()
    settings = {
        **dataclasses.asdict(config),
        "tensor_model_parallel_size": 2,
        "make_vocab_size_divisible_by": 64,
    }
    settings |= {name: getattr(config, name) for name in ("mlp_width", "query_groups", "head_dim")}
    tokenizer = SentencePieceTokenizer.load(prepared.tokenizer)
    saved = {"step": 3, "world_size": 2, "tokenizer_sha256": tokenizer.sha256, "settings": settings}
    (step / "run.json").write_text(json.dumps(saved))
    (folder / "latest").write_text(step.name)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for rank in (0, 1):
        shards = {
            name: cut_shard(x.detach(), x.partition_dim, x.partition_stride, rank=rank, size=2).clone()
            if getattr(x, "tensor_model_parallel", False)
            else x.detach().clone()
            for name, x in state.items()
        }
        torch.save({"module": shards}, step / f"mp_rank_{rank:02d}_model_states.pt")
    write_manifest(step, {path.name: record_of(path) for path in step.iterdir()})
    return folder


def test_weights_of_two_ranks_load_into_one(checkpoint, model):
    run = open_run(str(checkpoint), None, argument="--load it")
    smaller = generation_config(run.settings, run.tensor_parallel_size(None))
    assert smaller.tensor_model_parallel_size == 1 and not smaller.sequence_parallel
    torch.manual_seed(9)
    other = build_model(smaller, 512, on_gpu=False)
    load_weights(other, run)
    for name, parameter in model.named_parameters():
        assert torch.equal(dict(other.named_parameters())[name], parameter), name


def test_a_run_with_fused_rope_is_decoded_without_it(checkpoint, machine):
    settings = json.loads((checkpoint / "step_00000003" / "run.json").read_text())["settings"]
    config = generation_config(settings | {"apply_rope_fusion": True}, 1)
    decoder = ModelDecoder(build_model(config, 512, on_gpu=False).eval(), batch_size=2, max_sequence_length=8)
    made = generate(decoder, [[5, 6, 7], [8]], max_new_tokens=3, vocab_size=512, end=None)
    assert [len(tokens) for tokens in made.tokens] == [3, 3]


def test_a_checkpoint_without_scorers_or_with_a_damaged_file_is_named(checkpoint, model, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    run = open_run(str(folder), None, argument="--load it")
    file = folder / "step_00000003" / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=True)
    dense = {name: x for name, x in state["module"].items() if ".scorer." not in name}
    torch.save({"module": dense}, file)
    before = {name: x.clone() for name, x in model.named_parameters()}
    with pytest.raises(UserError, match="the checkpoint has no scorer"):
        load_weights(model, run)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"/copy/step_00000003: cannot be read \("):
        load_weights(model, run)
    assert all(torch.equal(before[name], x) for name, x in model.named_parameters())


def test_damaged_weights_are_passed_over_and_named(checkpoint, tmp_path, capsys, refused):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    shutil.copytree(folder / "step_00000003", folder / "step_00000006")
    (folder / "latest").write_text("step_00000006")
    assert newest_with_weights(str(folder), argument="--load it") == 6
    for name, first in (("step_00000006", 3), ("step_00000003", None)):
        file = folder / name / "mp_rank_01_model_states.pt"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        if first is not None:
            assert newest_with_weights(str(folder), argument="--load it") == first
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and f"{name}: mp_rank_01_model_states.pt is damaged" in said
    said = refused(generate_program, ["--load", str(folder), "--prompt", "a"], "generate.py")
    assert "no checkpoint there is intact" in said and "step_00000006" in said and "step_00000003" in said


def test_a_size_that_the_mlp_does_not_divide_by_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    settings = {"tensor_model_parallel_size": 1, "num_attention_heads": 8, "query_groups": 8, "mlp_width": 100}
    run = TrainedRun(tmp_path, 1, settings | {"make_vocab_size_divisible_by": 128}, tokenizer=None)
    assert run.tensor_parallel_size(4) == 4
    with pytest.raises(UserError, match=r"--tensor-model-parallel-size 8: .* the model's MLP width \(100\)"):
        run.tensor_parallel_size(8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", ""], "--prompt: the prompt is empty; give some text to continue"),
        (
            ["--prompt-file", "missing.txt"],
            "--prompt-file missing.txt: cannot be read (No such file or directory)",
        ),
        (
            ["--prompt", "a", "--max-new-tokens", "64"],
            "--max-new-tokens 64: with a prompt of 1 tokens this passes",
        ),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        (
            ["--prompt", "a", "--tensor-model-parallel-size", "3"],
            "3: does not divide the model's attention heads (4)",
        ),
        (["--promt", "a"], "--promt: unknown flag; did you mean --prompt?"),
    ],
)
def test_bad_input_is_one_line(flags, message, checkpoint, prepared, refused):
    flags = ["--tokenizer-model", prepared.tokenizer, "--max-new-tokens", "4", *flags]
    assert message in refused(generate_program, ["--load", str(checkpoint), *flags], "generate.py")


def test_prompts_come_from_flags_files_and_standard_input(tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("from a file\n", encoding="utf-8")
    assert [text for _, text in read_prompts(["one", "two"], [str(file)])] == ["one", "two", "from a file\n"]
    with open(file, encoding="utf-8") as stream:
        monkeypatch.setattr("sys.stdin", stream)
        assert read_prompts([], []) == [("--prompt-file -", "from a file\n")]
    file.write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 2\)"):
        read_prompts([], [str(file)])
    with pytest.raises(UserError, match=r"--prompt: not UTF-8 text \(byte 2\)"):
        read_prompts([os.fsdecode(b"ab\xff")], [])
    monkeypatch.setattr("sys.stdin", None)  # what Python makes of a closed one
    with pytest.raises(UserError, match="no prompt: give --prompt"):
        read_prompts([], [])
    with pytest.raises(UserError, match="standard input is closed"):
        read_prompts([], ["-"])


def run_apart(*arguments):
    """Run generate.py: what it wrote to standard output, and to standard error."""
    command = [sys.executable, str(REPOSITORY / "examples" / "generate.py"), *arguments]
    process = subprocess.Popen(
        command, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        said, times = process.communicate(timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise
    assert process.returncode == 0, times
    return said, times


def test_the_program_continues_several_prompts_on_two_processes(checkpoint, model, prepared):
    tokenizer = SentencePieceTokenizer.load(prepared.tokenizer)
    texts = ["import ", "def f(x):\n"]
    prompts = [tokenizer.tokenize(text) for text in texts]
    decoder = ModelDecoder(model, batch_size=2, max_sequence_length=64)
    made = generate(decoder, prompts, max_new_tokens=12, vocab_size=tokenizer.vocab_size, end=tokenizer.eod)
    said, times = run_apart(
        "--load", str(checkpoint), "--prompt", texts[0], "--prompt", texts[1], "--max-new-tokens", "12",
        "--tensor-model-parallel-size", "2",
    )  # fmt: skip
    for row, (text, prompt, tokens) in enumerate(zip(texts, prompts, made.tokens, strict=True)):
        pieces = []
        stream = TextStream(tokenizer, prompt, pieces.append)
        for token in tokens:
            stream.add(token)
        stream.end()
        block = f"--- prompt {row + 1} of 2\n{text}{''.join(pieces)}\n"
        assert block in said
        said = said.replace(block, "")  # in the order in which they end
    assert said == ""
    assert f"cache {decoder.cache_bytes // 2:,} bytes per sequence, 2 sequences" in times
    assert "first token after" in times and "tokens/s" in times
