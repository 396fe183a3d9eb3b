# SPDX-License-Identifier: Apache-2.0
"""Flags, YAML files, and every refusal that needs no process group."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import REPOSITORY, run

from sparsek_megatron.errors import UserError
from sparsek_megatron.training.arguments import TrainingConfig, parse
from sparsek_megatron.training.launcher import world_size_of_environment
from sparsek_megatron.training.manifest import record_of, write_manifest
from sparsek_megatron.training.parallel import initialize
from sparsek_megatron.training.pretrain import pretrain
from sparsek_megatron.training.trained_run import generation_config
from sparsek_megatron.training.validate import check_deepspeed, check_precision, check_ranges, sparsek_config

NEEDED = ["--save", "runs/x", "--tokenizer-model", "t.model"]


def test_flags_override_yaml_overrides_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "num-layers: 3\nhidden_size: 64\nnum-attention-heads: 4\nseq-length: 128\ntrain-iters: 7\nlr: 1e-3\n"
        "sequence-parallel: true\ntrain-data-path: [0.3, a, 0.7, b]\nsparsek-pool:\n"
    )
    config, processes = parse([*NEEDED, "--config", str(path), "--hidden-size", "32", "--nproc-per-node", "2"])
    assert (config.num_layers, config.hidden_size, config.lr, config.adam_beta2) == (3, 32, 1e-3, 0.95)
    assert config.sequence_parallel and config.train_data_path == ("0.3", "a", "0.7", "b")
    assert config.sparsek_pool is None and processes == 2
    assert not parse([*NEEDED, "--config", str(path), "--no-sequence-parallel"])[0].sequence_parallel


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num-layer: 3", r"unknown key 'num-layer'; did you mean num-layers\?"),
        ("num-layers: many", "num-layers: 'many' is not an integer"),
        ("lr: fast", "lr: 'fast' is not a number"),
        ("sequence-parallel: 1", "sequence-parallel: 1 must be true or false"),
        ("sparsek-gate: both", "must be one of key_value, value, logit"),
        ("zero-stage: 4", "must be one of 0, 1, 2, 3"),
        ("- a", "must be a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_yaml_names_file_and_key(tmp_path, text, said):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"c\.yaml.*{said}"):
        parse([*NEEDED, "--config", str(path)])


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples" / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_file_is_valid(path):
    config, _ = parse([*NEEDED, "--config", str(path)])
    check_ranges(config)
    sparsek_config(config)
    assert config.num_attention_heads % config.tensor_model_parallel_size == 0
    if "cpu" not in path.stem:
        assert config.head_dim in (64, 80, 96, 128, 192, 256)  # what the Triton kernels take


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--num-layrs 3", "--num-layrs: unknown flag; did you mean --num-layers?"),
        ("--spasek-topk 3", "did you mean --sparsek-topk?"),
        ("--num-layers three", "--num-layers: invalid int value: 'three'"),
        ("stray", "'stray': unexpected word"),
        ("--num-attention-heads 6 --num-query-groups 4", "does not divide --num-attention-heads 6; use one of"),
        ("--num-attention-heads 3 --num-query-groups 3 --hidden-size 48 --nproc-per-node 2 "
         "--tensor-model-parallel-size 2", "--num-attention-heads 3: not divisible by --tensor-model-parallel-size 2"),
        ("--num-query-groups 1 --nproc-per-node 2 --tensor-model-parallel-size 2",
         "--num-query-groups 1: not divisible by --tensor-model-parallel-size 2"),
        ("--hidden-size 30", "--hidden-size 30: not divisible by --num-attention-heads 4"),
        ("--seq-length 63 --nproc-per-node 2 --tensor-model-parallel-size 2 --sequence-parallel",
         "--seq-length 63: not divisible by --tensor-model-parallel-size 2 under --sequence-parallel"),
        ("--sequence-parallel", "--sequence-parallel: needs --tensor-model-parallel-size above 1"),
        ("--sparsek-topk 0", "--sparsek-topk 0: must be between 1 and --seq-length 64"),
        ("--sparsek-topk 65", "--sparsek-topk 65: must be between 1"),
        ("--sparsek-window 0", "--sparsek-window 0: must be between 1"),
        ("--sparsek-stride 100", "--sparsek-stride 100: must be between 1"),
        ("--sparsek-pool 8", "--sparsek-pool 8: must be above --sparsek-topk 8"),
        ("--sparsek-pool 3", "--sparsek-pool 3: must be above --sparsek-topk 8"),
        ("--sparsek-pool 9 --sparsek-hard-selection", "with --sparsek-hard-selection it must equal topk"),
        ("--sparsek-pool 20000", "--sparsek-pool 20000: thresholds are exact up to 16384; set pool to at most 16384"),
        ("--sparsek-topk 5000 --seq-length 8192", "--sparsek-pool 20000, the default for topk=5000: thresholds"),
        ("--sparsek-lr-mult -1", "--sparsek-lr-mult -1.0: must be a finite number >= 0"),
        ("--sparsek-initial-slope -1", "--sparsek-initial-slope -1.0: must be a finite number >= 0"),
        ("--tensor-model-parallel-size 2", "does not divide the 1 processes started"),
        ("--nproc-per-node 0", "--nproc-per-node 0: must be at least 1"),
        ("--global-batch-size 3", "--global-batch-size 3: not a multiple of --micro-batch-size 2 x 1"),
        ("--pipeline-model-parallel-size 2", "use 1, or Megatron's own trainer"),
        ("--context-parallel-size 2", "--context-parallel-size 2: times --tensor-model-parallel-size 1 it does not"),
        ("--seq-length 62 --nproc-per-node 2 --context-parallel-size 2",
         "--seq-length 62: not divisible by 2 x --context-parallel-size 2; use 64"),
        ("--seq-length 60 --nproc-per-node 4 --context-parallel-size 2 --tensor-model-parallel-size 2 "
         "--sequence-parallel",
         "--seq-length 60: not divisible by 2 x --context-parallel-size 2 x 2 for --sequence-parallel; use 64"),
        ("--num-query-groups 1 --nproc-per-node 2 --context-parallel-size 2 --cp-comm-type a2a",
         "--cp-comm-type a2a: 1 KV heads on a rank do not divide by --context-parallel-size 2; use p2p"),
        ("--bf16", "--bf16: on CPU this trainer runs in float32"),
        ("--train-iters 0", "--train-iters is missing"),
        ("--lr -1", "--lr -1.0: must be at least 0"),
        ("--lr nan", "--lr nan: must be at least 0"),
        ("--lr inf", "--lr inf: must be at least 0, and finite"),
        ("--seed -1", "--seed -1: must be at least 0 and below 2^32"),
        ("--seed 4294967296", "--seed 4294967296: must be at least 0 and below 2^32"),
        ("--adam-beta2 1.5", "--adam-beta2 1.5: must be at least 0 and below 1"),
        ("--adam-eps -1", "--adam-eps -1.0: must be above 0"),
        ("--rotary-base 0", "--rotary-base 0: must be at least 1"),
        ("--eval-iters -1", "--eval-iters -1: must be at least 0"),
        ("--data-path x", "exclude each other"),
        ("--config absent.yaml", "absent.yaml: cannot be read"),
        ("--load elsewhere", "--load elsewhere: holds no checkpoint"),
        ("--train-data-path absent", "absent.bin does not exist"),
        ("--train-data-path 0.5 a b", "0.5.bin does not exist"),
        ("--train-data-path 0 a 0.5 b", "--train-data-path 0 a: the weight must be above 0"),
        ("--tokenizer-model absent", "--tokenizer-model absent: No such file"),
    ],
)  # fmt: skip
def test_bad_settings_end_in_one_line(prepared, refused, tmp_path, monkeypatch, flags, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    save = tmp_path / "run"
    message = refused(pretrain, [*prepared.flags(save), *flags.split()], "pretrain_gpt.py")
    assert said in message
    assert not save.exists() or list(save.iterdir()) == []


@pytest.mark.parametrize("split", ["abc", "-5,5,0", "95,5,0,0", "0,100,0", "95;5", "nan,5", "1e2,5", ""])
def test_a_split_that_is_no_proportion_is_refused(prepared, refused, tmp_path, split):
    flags = [*prepared.flags(tmp_path / "run"), f"--split={split}", "--data-path", prepared.train]
    for name in ("--train-data-path", "--valid-data-path"):
        place = flags.index(name)
        del flags[place : place + 2]
    assert f"--split {split}: must be the train,valid,test parts" in refused(pretrain, flags, "")


def test_the_initial_slope_reaches_the_model_and_stays_in_the_runs_record(prepared, tmp_path):
    config, _ = parse([*prepared.flags(tmp_path), "--sparsek-initial-slope", "4"])
    assert sparsek_config(config).initial_slope == 4.0
    assert sparsek_config(generation_config(dataclasses.asdict(config), 1)).initial_slope == 4.0


def test_another_tokenizer_than_the_datas_is_refused(prepared, refused, tmp_path):
    from sparsek_megatron.data.tokenizer import train_tokenizer

    other = tmp_path / "other.model"
    train_tokenizer(["some other text of its own\n" * 9], vocab_size=290, path=other)
    given = [*prepared.flags(tmp_path / "run"), "--tokenizer-model", str(other)]
    assert "not the tokenizer that made" in refused(pretrain, given, "")
    # Data of another program has no card: then the token ids themselves tell.
    bare = tmp_path / "bare"
    for suffix in (".bin", ".idx"):
        Path(f"{bare}{suffix}").write_bytes(Path(prepared.train + suffix).read_bytes())
    assert "has 290 tokens; give the tokenizer" in refused(pretrain, [*given, "--train-data-path", str(bare)], "")


def test_an_unwritable_save_folder_is_refused(prepared, refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = refused(pretrain, prepared.flags(tmp_path / "file" / "run"), "")
    assert "--save" in message and "cannot write there" in message


def checkpoint_of(config: TrainingConfig, save: Path, tokenizer_sha256: str, **changes) -> None:
    """A run folder whose checkpoint has only what the checks read."""
    from dataclasses import asdict

    names = ("mlp_width", "query_groups", "head_dim")
    settings = asdict(config) | {name: getattr(config, name) for name in names} | changes
    folder = save / "step_00000003"
    folder.mkdir(parents=True)
    run_json = {"step": 3, "world_size": changes.get("world_size", 1), "settings": settings}
    (folder / "run.json").write_text(json.dumps(run_json | {"tokenizer_sha256": tokenizer_sha256}))
    write_manifest(folder, {"run.json": record_of(folder / "run.json")})
    (save / "latest").write_text(folder.name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 5}, "a checkpoint of another architecture: its --num-layers is 5, this run's is 2"),
        ({"query_groups": 4}, "its --num-query-groups is 4, this run's is 2"),
        ({"sparsek_gate": "value"}, "its --sparsek-gate is value"),
        ({"zero_stage": 3}, "in another layout: its --zero-stage is 3, this run's is 1. DeepSpeed's files of ZeRO-3"),
        ({"zero_stage": 0}, "its --zero-stage is 0, this run's is 1. DeepSpeed's files of ZeRO-0"),
        ({"make_vocab_size_divisible_by": 500}, "pads the vocabulary to 512, the checkpoint's is 1000; use 500 at"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(prepared, refused, tmp_path, changes, said):
    from sparsek_megatron.data.tokenizer import SentencePieceTokenizer

    save = tmp_path / "run"
    flags = [*prepared.flags(save), "--load", str(save)]
    checkpoint_of(parse(flags)[0], save, SentencePieceTokenizer.load(prepared.tokenizer).sha256, **changes)
    assert said in refused(pretrain, flags, "")


def test_checkpoints_are_not_replaced_by_accident(prepared, refused, tmp_path):
    save = tmp_path / "run"
    flags = prepared.flags(save)
    checkpoint_of(parse(flags)[0], save, "another tokenizer")
    assert "already holds a checkpoint of step 3; resume it with --load" in refused(pretrain, flags, "")
    assert "not the tokenizer that" in refused(pretrain, [*flags, "--load", str(save)], "")
    (save / "latest").write_text("step_00000009")
    (save / "step_00000003" / "run.json").unlink()
    message = refused(pretrain, [*flags, "--load", str(save)], "")
    assert "no checkpoint there is complete" in message and "run.json is missing" in message
    assert "latest: names step_00000009, which is not there" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"world_size": 4}, "its --nproc-per-node (processes in all) is 4, this run's is 1"),
        ({"world_size": 2, "tensor_model_parallel_size": 2}, "its --tensor-model-parallel-size is 2, this run's is 1"),
    ],
)  # fmt: skip
def test_a_zero3_checkpoint_of_another_layout_is_refused(prepared, refused, tmp_path, changes, said):
    from sparsek_megatron.data.tokenizer import SentencePieceTokenizer

    save = tmp_path / "run"
    flags = [*prepared.flags(save), "--load", str(save), "--zero-stage", "3"]
    sha256 = SentencePieceTokenizer.load(prepared.tokenizer).sha256
    checkpoint_of(parse(flags)[0], save, sha256, **changes)
    message = refused(pretrain, flags, "")
    assert said in message and "only ZeRO 1 and 2" in message


def test_mlp_tiles_need_whole_weights(prepared):
    config, _ = parse([*prepared.flags(Path("x")), "--zero-stage", "3", "--mlp-tile-tokens", "16"])
    with pytest.raises(UserError, match="--mlp-tile-tokens 16: under ZeRO-3"):
        check_deepspeed(config, 1, on_gpu=False)
    check_deepspeed(dataclasses.replace(config, zero_stage=2), 1, on_gpu=False)


def test_a_process_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for given in ("RANK=2", "WORLD_SIZE=4", "LOCAL_RANK=2", "MASTER_ADDR=x", "MASTER_PORT=1"):
        monkeypatch.setenv(*given.split("="))
    with pytest.raises(UserError, match=r"process 2 of this node \(from 0\) has no GPU: there are 2; start at most"):
        initialize(TrainingConfig())


def test_bf16_with_tensor_parallelism_needs_zero(prepared):
    config, _ = parse([*prepared.flags(Path("x")), "--zero-stage", "0", "--tensor-model-parallel-size", "2"])
    check_precision(config, on_gpu=False)
    with pytest.raises(UserError, match="wrong gradient norm"):
        check_precision(config, on_gpu=True)


def test_the_program_itself_exits_with_two_and_one_line(prepared, tmp_path):
    said = run("pretrain_gpt.py", *prepared.flags(tmp_path / "run"), "--num-layrs", "4", code=2)
    assert said == "error: --num-layrs: unknown flag; did you mean --num-layers?\n"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ("RANK=0 WORLD_SIZE=2", "WORLD_SIZE=2 in the environment, but MASTER_ADDR is not set; start through torchrun"),
        ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=a", "WORLD_SIZE=2 in the environment, but MASTER_PORT is not set"),
        ("WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "WORLD_SIZE=2 in the environment, but RANK is not set"),
        ("RANK=0 WORLD_SIZE=abc", "WORLD_SIZE=abc in the environment: not a number"),
        ("RANK=-1 WORLD_SIZE=2", "RANK=-1 in the environment: not a number"),
        ("RANK=2 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "RANK=2 in the environment: not below WORLD_SIZE=2"),
        ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=x", "LOCAL_RANK=x in the environment: not a number"),
        ("RANK=0 WORLD_SIZE=1 MASTER_ADDR=a MASTER_PORT=x", "MASTER_PORT=x in the environment: not a number"),
    ],
)  # fmt: skip
def test_half_of_a_launchers_variables_is_refused_before_anything_is_trained(monkeypatch, refused, variables, said):
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for each in variables.split():
        monkeypatch.setenv(*each.split("="))
    config, _ = parse([*NEEDED, "--config", str(REPOSITORY / "examples/configs/tiny_cpu.yaml")])
    assert said in refused(world_size_of_environment) and said in refused(initialize, config)


def test_a_line_leaves_in_one_write_whatever_the_buffering():
    """Ranks share one output: two writes a line would let another rank's line come between."""
    code = (
        "import sys\n"
        "from sparsek_megatron.errors import report_user_errors\n"
        "with report_user_errors():\n"
        "    print('step', 8, flush=True)\n"
        "    print('warning: old', file=sys.stderr)\n"
    )
    out, into = os.pipe2(os.O_DIRECT)  # packets: each write is read by itself
    subprocess.run([sys.executable, "-u", "-c", code], stdout=into, stderr=into, check=True)
    os.close(into)
    assert [os.read(out, 4096) for _ in range(3)] == [b"step 8\n", b"warning: old\n", b""]
    os.close(out)


def test_a_reader_that_goes_ends_the_program_quietly():
    code = (
        "from sparsek_megatron.errors import report_user_errors\n"
        "with report_user_errors():\n"
        "    while True:\n"
        "        print('a word', end=' ')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(3) == b"a w"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("flags", "wanted"), [([], "1"), (["--tensor-model-parallel-size", "1", "--no-sequence-parallel"], None)]
)
def test_launches_are_ordered_before_cuda_starts_where_ranks_share_a_layer(monkeypatch, flags, wanted):
    """The driver reads the variable once. Asking torch for a device starts it."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "")  # what it was comes back after the test
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    seen = []

    def ask():
        seen.append(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
        return False

    monkeypatch.setattr("torch.cuda.is_available", ask)
    config = str(REPOSITORY / "examples/configs/tiny_cpu.yaml")
    with pytest.raises(UserError):
        pretrain([*NEEDED, "--config", config, *flags], "pretrain_gpt.py")
    assert seen and set(seen) == {wanted}
