# SPDX-License-Identifier: Apache-2.0
"""Generation: tokens drawn as asked, logits of the training forward, checkpoints of any TP size, one-line refusals."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from programs import LONGEST_SECONDS, REPOSITORY, environment, kill_all
from sparsek_kernels import select

from sparsek_megatron.cpu import enable_cpu
from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.errors import UserError
from sparsek_megatron.inference_model import ModelDecoder
from sparsek_megatron.inference_weights import load_weights
from sparsek_megatron.training import parallel
from sparsek_megatron.training.arguments import parse
from sparsek_megatron.training.generate import (
    generate_program,
    generation_config,
    newest_with_weights,
    read_prompts,
)
from sparsek_megatron.training.manifest import record_of, write_manifest
from sparsek_megatron.training.model import build_model, token_losses
from sparsek_megatron.training.reshard import cut_shard
from sparsek_megatron.training.sampling import Sampling, draw, generate, probabilities
from sparsek_megatron.training.text_stream import TextStream

LONGEST = 64


@pytest.fixture(scope="module")
def config(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    config, _ = parse([*prepared.flags(folder), "--nproc-per-node", "1"])
    return config


@pytest.fixture(scope="module", autouse=True)
def machine(config):
    """Megatron's groups over this process alone; on top of the process group that other tests may have left."""
    if torch.cuda.is_available():
        pytest.skip("these models are built on the CPU; tests/plugin/test_gpu_inference.py is for GPUs")
    if torch.distributed.is_initialized():
        enable_cpu()
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(config.seed)
        yield
        parallel_state.destroy_model_parallel()
        return
    before = dict(os.environ)
    parallel.initialize(config)
    yield
    parallel.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def model(config, prepared):
    torch.manual_seed(5)
    model = build_model(config, SentencePieceTokenizer.load(prepared.tokenizer).vocab_size, on_gpu=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)  # far from uniform logits
    return model.eval()


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


PROMPTS = [[5, 9, 300, 41], [7], [17, 8, 120, 33], list(range(20, 51))]


@torch.no_grad()
def test_greedy_tokens_are_the_likeliest_of_the_training_forward(model):
    decoder = ModelDecoder(model, batch_size=4, max_sequence_length=LONGEST, prefill_tokens=9)
    made = generate(decoder, PROMPTS, max_new_tokens=30, vocab_size=512)
    for prompt, tokens in zip(PROMPTS, made.tokens, strict=True):
        logits = token_losses(model, torch.tensor([prompt + tokens]), None)[0, len(prompt) - 1 : -1, :512]
        assert logits.argmax(-1).tolist() == tokens and len(set(tokens)) > 1
    assert made.prompt_tokens == 40 and made.first_token_seconds > 0 and made.tokens_per_second > 0


@torch.no_grad()
def test_logits_of_prompts_in_pieces_and_steps_are_those_of_the_training_forward(model):
    decoder = ModelDecoder(model, batch_size=4, max_sequence_length=LONGEST, prefill_tokens=12)
    steps = torch.randint(0, 512, (30, 4), generator=torch.Generator().manual_seed(0))
    logits = [decoder.prefill(PROMPTS), *(decoder.step(tokens).clone() for tokens in steps)]
    for row, prompt in enumerate(PROMPTS):
        whole = token_losses(model, torch.tensor([prompt + steps[:, row].tolist()]), None)[0]
        assert (
            torch.stack([x[row] for x in logits]) - whole[len(prompt) - 1 :]
        ).abs().max() < 1e-4 * whole.abs().max()


@torch.no_grad()
def test_recomputed_scores_select_the_same_keys(model):
    """Scores of a step come from other matrix shapes than those of a whole forward: how many selections differ."""
    tokens = torch.randint(0, 512, (1, LONGEST), generator=torch.Generator().manual_seed(1))
    recorded = {}

    def record(name):
        def hook(module, inputs, scores):
            recorded.setdefault(name, []).append(scores)

        return hook

    scorers = [m for m in model.modules() if type(m).__name__ == "ScoringNetwork"]
    handles = [m.register_forward_hook(record(i)) for i, m in enumerate(scorers)]
    token_losses(model, tokens, None)
    decoder = ModelDecoder(model, batch_size=1, max_sequence_length=LONGEST)
    decoder.prefill([tokens[0, :20].tolist()])
    for token in tokens[0, 20:]:
        decoder.step(token[None])
    for handle in handles:
        handle.remove()
    different = total = 0
    for whole, *pieces in recorded.values():
        again = torch.cat(pieces, dim=1)
        assert (whole - again).abs().max() < 1e-4
        one, other = (select(x, topk=8, window=8, stride=4).evict for x in (whole, again))
        different, total = different + int((one != other).sum()), total + one.numel()
    assert total == 2 * 2 * LONGEST and different <= 1, f"{different} of {total} keys are evicted elsewhere"


def test_cache_bytes_do_not_depend_on_the_length(model):
    sizes = set()
    for longest, prompt in ((8, [1]), (LONGEST, list(range(60)))):
        decoder = ModelDecoder(model, batch_size=1, max_sequence_length=longest)
        decoder.prefill([prompt])
        sizes.add(decoder.cache_bytes)
    assert len(sizes) == 1


def test_what_does_not_fit_is_refused_and_the_decoder_stays_usable(model):
    decoder = ModelDecoder(model, batch_size=2, max_sequence_length=6)
    with pytest.raises(ValueError, match=r"step\(\) before prefill\(\)"):
        decoder.step(torch.tensor([1, 2]))
    expected = decoder.prefill([[1, 2], [3]])
    for prompts, message in (
        ([[1]], "1 prompts for a batch of 2"),
        ([[1], []], "prompt 1 is empty"),
        ([[1] * 7, [1]], "prompt 0 has 7 tokens, more than max_sequence_length=6"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.prefill(prompts)
    for _ in range(4):
        decoder.step(torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="already holds max_sequence_length=6 tokens"):
        decoder.step(torch.tensor([1, 1]))
    assert torch.equal(decoder.prefill([[1, 2], [3]]), expected)


def test_logits_that_are_not_finite_end_in_one_line_and_the_decoder_stays_usable(model):
    decoder = ModelDecoder(model, batch_size=2, max_sequence_length=LONGEST)
    expected = generate(decoder, [[1], [2]], max_new_tokens=4, vocab_size=512)
    weight = model.embedding.word_embeddings.weight
    kept = weight[2].clone()
    with torch.no_grad():
        weight[2] = float("nan")
        with pytest.raises(UserError, match=r"prompt [12]: the logits after [0-9]+ tokens are not finite"):
            generate(decoder, [[1], [2]], max_new_tokens=4, vocab_size=512)
        weight[2] = kept
    assert generate(decoder, [[1], [2]], max_new_tokens=4, vocab_size=512).tokens == expected.tokens


def test_a_row_ends_before_the_end_token_while_others_go_on(model):
    decoder = ModelDecoder(model, batch_size=4, max_sequence_length=LONGEST)
    free = generate(decoder, PROMPTS, max_new_tokens=20, vocab_size=512).tokens
    end = free[0][5]
    calls = []
    made = generate(
        decoder,
        PROMPTS,
        max_new_tokens=20,
        vocab_size=512,
        end=end,
        on_token=lambda *call: calls.append(call),
    )
    assert made.tokens == [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in free]
    for row, tokens in enumerate(made.tokens):
        assert [token for r, token in calls if r == row] == [*tokens, None]


def test_drawing_follows_temperature_top_k_and_top_p():
    logits = torch.tensor([[2.0, 0.5, 1.0, -1.0, 1.0]]).expand(2000, -1)
    for sampling in (
        Sampling(temperature=1.0),
        Sampling(temperature=0.5, top_k=3),
        Sampling(temperature=2.0, top_p=0.6),
        Sampling(temperature=1.0, top_k=4, top_p=0.9),
    ):
        p = torch.softmax(logits[0].double() / sampling.temperature, -1)
        order = sorted(range(5), key=lambda i: (-p[i].item(), i))[: sampling.top_k or 5]
        mass, kept = 0.0, []
        for token in order:
            if mass < sampling.top_p * sum(p[i].item() for i in order):
                kept.append(token)
            mass += p[token].item()
        expected = torch.zeros(5, dtype=torch.float64).index_put_(
            (torch.tensor(kept),), p[kept] / p[kept].sum()
        )
        weights, tokens = probabilities(logits[:1], sampling)
        assert torch.allclose(
            torch.zeros(5, dtype=torch.float64).scatter_(0, tokens[0], weights[0]), expected
        )
        drawn = draw(logits, sampling, sampling.generators(2000))
        seen = torch.bincount(drawn, minlength=5).double() / 2000
        assert (seen - expected).abs().max() < 0.05 and (seen[expected == 0] == 0).all()
    assert draw(logits[:1], Sampling(), []).item() == 0


def test_a_row_draws_the_same_alone_and_in_a_batch():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = draw(logits, Sampling(temperature=1.0, seed=7), Sampling(seed=7).generators(3))
    for row in range(3):
        alone = draw(logits[row : row + 1], Sampling(temperature=1.0), Sampling(seed=7 + row).generators(1))
        assert alone.item() == together[row].item()


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"seed": -1},
        {"seed": 2**63},
    ],
)  # fmt: skip
def test_sampling_out_of_range_is_named(bad):
    name = next(iter(bad)).replace("_", "-")
    with pytest.raises(UserError, match=f"--{name} .*: must be"):
        Sampling(**bad)


def test_text_is_handed_on_in_whole_characters(prepared):
    tokenizer = SentencePieceTokenizer.load(prepared.tokenizer)
    text = "naïve 日本 = 🙂\n"  # bytes: none of these are in the vocabulary
    ids, pieces = tokenizer.tokenize(text), []
    stream = TextStream(tokenizer, tokenizer.tokenize("def f"), pieces.append)
    for token in ids:
        stream.add(token)
    stream.end()
    assert "".join(pieces) == text and len(pieces) > 4 and not any("\ufffd" in piece for piece in pieces)


def test_weights_of_two_ranks_load_into_one(checkpoint, model):
    settings = json.loads((checkpoint / "step_00000003" / "run.json").read_text())["settings"]
    smaller = generation_config(settings, 1)
    assert smaller.tensor_model_parallel_size == 1 and not smaller.sequence_parallel
    torch.manual_seed(9)
    other = build_model(smaller, 512, on_gpu=False)
    load_weights(other, checkpoint, step=3, saved_size=2)
    for name, parameter in model.named_parameters():
        assert torch.equal(dict(other.named_parameters())[name], parameter), name


def test_a_checkpoint_without_scorers_or_with_a_damaged_file_is_named(checkpoint, model, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    file = folder / "step_00000003" / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=True)
    dense = {name: x for name, x in state["module"].items() if ".scorer." not in name}
    torch.save({"module": dense}, file)
    before = {name: x.clone() for name, x in model.named_parameters()}
    with pytest.raises(UserError, match="the checkpoint has no scorer"):
        load_weights(model, folder, step=3, saved_size=2)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"the checkpoint of step 3 cannot be read \("):
        load_weights(model, folder, step=3, saved_size=2)
    assert all(torch.equal(before[name], x) for name, x in model.named_parameters())


def test_damaged_weights_are_passed_over_and_named(checkpoint, tmp_path, capsys, refused):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    shutil.copytree(folder / "step_00000003", folder / "step_00000006")
    (folder / "latest").write_text("step_00000006")
    assert newest_with_weights(str(folder)) == 6
    for name, first in (("step_00000006", 3), ("step_00000003", None)):
        file = folder / name / "mp_rank_01_model_states.pt"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        if first is not None:
            assert newest_with_weights(str(folder)) == first
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and f"{name}: mp_rank_01_model_states.pt is damaged" in said
    said = refused(generate_program, ["--load", str(folder), "--prompt", "a"], "generate.py")
    assert "no checkpoint there is intact" in said and "step_00000006" in said and "step_00000003" in said


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
    decoder = ModelDecoder(model, batch_size=2, max_sequence_length=LONGEST)
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
