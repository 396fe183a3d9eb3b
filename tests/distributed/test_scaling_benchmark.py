# SPDX-License-Identifier: Apache-2.0
"""The scaling benchmark on two CPU processes: a row for every mesh, traffic that tells CP from TP, and how it ends."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from programs import environment

from sparsek_megatron.errors import UserError
from sparsek_megatron.planning.calibration import measurements

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAM = EXAMPLES / "benchmark_scaling.py"
SMALL = (
    "--layers 1 --hidden-size 64 --ffn-hidden-size 96 --heads 4 --kv-heads 2 --head-dim 16 --topk 8 --window 8 "
    "--stride 8 --steps 1"
)


def torchrun(program: Path, flags: str) -> subprocess.CompletedProcess[str]:
    """The program on two CPU processes."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
    ]
    return subprocess.run(
        [*command, str(program), *flags.split()], env=environment(), capture_output=True, text=True, timeout=400
    )


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, imported."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import benchmark_scaling

    return benchmark_scaling


def received(row: dict[str, str]) -> int:
    """Bytes of all collectives of a row."""
    return sum(int(part.split("=")[1]) for part in row["by_collective"].split())


def test_rows_for_every_mesh_and_bytes_by_collective(tmp_path: Path) -> None:
    done = torchrun(
        PROGRAM, f"--tokens 256 512 --meshes 1x1 2x1 1x2 --sides sparsek dense {SMALL} --out {tmp_path}"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = {(r["side"], r["tp"], r["cp"], r["tokens"]): r for r in csv.DictReader(file)}
    assert len(measurements(list(rows.values()))) == 6  # what the planner's calibration reads
    assert len(rows) == 10  # dense has no context parallelism
    assert (tmp_path / "scaling.png").stat().st_size > 0
    assert "dense: no context parallelism, left out at 1x2" in done.stdout
    assert rows["sparsek", "1", "1", "512"]["by_collective"] == ""
    short, long = (rows["sparsek", "1", "2", n]["by_collective"] for n in ("256", "512"))
    assert short == long and "CONTEXT_PARALLEL_GROUP" in short
    assert "TENSOR_MODEL_PARALLEL_GROUP" in rows["dense", "2", "1", "512"]["by_collective"]
    sparse, dense = (received(rows[side, "2", "1", "512"]) for side in ("sparsek", "dense"))
    assert dense < sparse < 1.1 * dense  # the scores' change of layout
    assert rows["sparsek", "1", "2", "512"]["exposed_communication_ms"] == "not measured"  # on CPU


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--meshes 2", "--meshes: '2': must be TPxCP, like 2x1"),
        ("--meshes 1x1 0x1", "--meshes: '0x1': must be TPxCP, like 2x1"),
        ("--meshes axb", "--meshes: 'axb': must be TPxCP, like 2x1"),
        ("--mesh 1x1", "--mesh: unknown flag; did you mean --meshes?"),
        ("--tokens 0", "--tokens 0: must be at least 1"),
        ("--tokens 64 -64", "--tokens -64: must be at least 1"),
        ("--steps 0", "--steps 0: must be at least 1"),
        ("--warmup -1", "--warmup -1: must be at least 0"),
        ("--mlp-tile-tokens 0", "--mlp-tile-tokens 0: must be at least 1"),
        ("--topk 0", "--topk 0: must be at least 1"),
        ("--topk 5000", "--topk 5000: pool=20000, the default for topk=5000"),
        ("--kv-heads 3", "--kv-heads 3: must divide --heads 32"),
        ("--head-dim 15", "--head-dim 15: must be even for RoPE"),
        ("--meshes 3x1", "--meshes 3x1: 4 processes are no multiple of 3; start more"),
        ("--meshes 4x1 --kv-heads 2", "--meshes 4x1: --kv-heads 2 does not divide by TP = 4"),
        ("--meshes 2x1 --ffn-hidden-size 97", "--meshes 2x1: --ffn-hidden-size 97 does not divide by TP = 2"),
        ("--tokens 66 --meshes 1x2", "--tokens 66: --meshes 1x2 needs a multiple of 4"),
        ("--tokens 65 --meshes 2x1", "--tokens 65: --meshes 2x1 needs a multiple of 2"),
        ("--tokens 33 --per-gpu --meshes 1x2", "--tokens 66 (2 times those of one GPU): --meshes 1x2 needs"),
        (
            "--meshes 1x2 --cp-comm-type a2a --kv-heads 1",
            "the 1 KV heads of a tensor-parallel rank do not divide by",
        ),
        (
            "--sides dense --meshes 1x2",
            "--sides dense: it has no context parallelism; add a mesh with CP = 1",
        ),
    ],
)
def test_what_no_case_can_run_with_is_named(program: ModuleType, flags: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as raised:
        program.cases(program.build_parser("").parse_args(flags.split()), world_size=4, on_gpu=False)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("flags", ["--head-dim 48", "--heads 1024 --kv-heads 1"])
def test_what_the_gpu_kernels_lack_is_named_on_a_gpu_alone(program: ModuleType, flags: str) -> None:
    args = program.build_parser("").parse_args(flags.split())
    assert program.cases(args, world_size=1, on_gpu=False)
    with pytest.raises(UserError, match="the GPU kernels have"):
        program.cases(args, world_size=1, on_gpu=True)


def test_a_folder_that_takes_no_rows_ends_in_one_line(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "results.csv").write_text("side,tp,cp\n")
    for out, words in ((tmp_path / "file", "cannot write there"), (tmp_path, "has other columns than")):
        monkeypatch.setattr(sys, "argv", ["benchmark_scaling.py", "--out", str(out)])
        with pytest.raises(SystemExit, match="2"), program.report_user_errors():
            program.main()
        line = capsys.readouterr().err
        assert line.startswith("error: --out") and words in line and line.count("\n") == 1


def test_alone_a_case_that_does_not_fit_is_a_row_and_the_next_one_follows(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(args, case, device):
        if case.tokens == 1024:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6 GiB. If reserved is large try this.")
        return dict.fromkeys(program.COLUMNS, "1") | program.described(args, case)

    groups = SimpleNamespace(initialize_model_parallel=lambda **_: None, destroy_model_parallel=lambda: None)
    monkeypatch.setattr(program, "parallel_state", groups)
    monkeypatch.setattr(program, "dist", SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1))
    monkeypatch.setattr(program, "measure", measure)
    args = program.build_parser("").parse_args(["--tokens", "1024", "512", "--out", str(tmp_path)])
    program.run(args, program.cases(args, world_size=1, on_gpu=False), torch.device("cpu"))
    rows = program.read_rows(tmp_path / "results.csv", "--out")
    assert [(row["tokens"], row["step_ms"]) for row in rows] == [("1024", "out of memory"), ("512", "1")]
    assert {row["layers"] for row in rows} == {"2"}
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    assert said == "sparsek, TP=1 CP=1, 1,024 tokens: rank 0: CUDA out of memory. Tried to allocate 6 GiB."


def test_out_of_memory_on_one_rank_ends_the_launch(tmp_path: Path) -> None:
    """The other rank waits in a collective that nobody joins."""
    program = tmp_path / "program.py"
    program.write_text(
        f"""import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import benchmark_scaling as program
def measure(*_):
    if program.dist.get_rank() == 1:
        raise program.torch.OutOfMemoryError
    program.dist.barrier()
program.measure = measure
program.main()
"""
    )
    done = torchrun(program, f"--tokens 256 --meshes 2x1 {SMALL} --out {tmp_path}")
    assert done.returncode != 0
    assert (
        "error: sparsek, TP=2 CP=1, 256 tokens: out of memory on rank 1; leave this case out" in done.stderr
    )


def test_the_committed_rows_can_be_drawn(program: ModuleType, tmp_path: Path) -> None:
    rows = program.read_rows(EXAMPLES / "results" / "scaling.csv", "--plot")
    program.plot(rows, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="is no number"):
        program.plot([{**rows[0], "tokens": "many"}], tmp_path / "scaling.png")
