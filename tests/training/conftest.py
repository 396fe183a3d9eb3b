# SPDX-License-Identifier: Apache-2.0
"""A small corpus, its tokenizer and its datasets, made once; and the programs as a user starts them."""

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparsek_megatron.data.prepare import prepare
from sparsek_megatron.errors import report_user_errors

REPOSITORY = Path(__file__).resolve().parents[2]
VOCABULARY = 512


@dataclass(frozen=True)
class Prepared:
    """Paths of the prepared corpus."""

    folder: Path

    @property
    def tokenizer(self) -> str:
        return str(self.folder / "tokenizer.model")

    @property
    def train(self) -> str:
        return str(self.folder / "text_train")

    @property
    def valid(self) -> str:
        return str(self.folder / "text_valid")

    def flags(self, save: Path) -> list[str]:
        """Flags of a run on this data with a model that takes milliseconds a step."""
        data = ["--tokenizer-model", self.tokenizer, "--train-data-path", self.train, "--valid-data-path", self.valid]
        model = (
            "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --seq-length 64 "
            "--sparsek-topk 8 --sparsek-window 8 --sparsek-stride 4 --micro-batch-size 2 --train-iters 8 --lr 1e-2 "
            "--eval-interval 4 --eval-iters 2 --save-interval 3 --log-interval 1"
        )
        return [*model.split(), *data, "--save", str(save)]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Prepared:
    folder = tmp_path_factory.mktemp("prepared")
    texts = folder / "texts"
    texts.mkdir()
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.glob("[a-h]*.py"))[:40]:
        (texts / path.name).write_bytes(path.read_bytes()[:20_000].decode("utf-8", "ignore").encode())
    prepare(
        ["--input", str(texts), "--train-tokenizer", "--vocab-size", str(VOCABULARY), "--validation-fraction", "0.2",
         "--tokenizer-model", str(folder / "tokenizer.model"), "--output-prefix", str(folder / "text"),
         "--workers", "1"]
    )  # fmt: skip
    return Prepared(folder)


def environment() -> dict[str, str]:
    """The environment of a started program: one thread each, no launcher's variables, no GPU."""
    left_out = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(script: str, *arguments: str, **options) -> subprocess.Popen:
    """Start an example in a session of its own."""
    command = [sys.executable, str(REPOSITORY / "examples" / script), *arguments]
    return subprocess.Popen(
        command, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True, **options,
    )  # fmt: skip


def run(script: str, *arguments: str, code: int = 0, **options) -> str:
    """Run an example to its end, require its exit code, and return what it printed."""
    process = start(script, *arguments, **options)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


@pytest.fixture
def refused(capsys, monkeypatch):
    """Call a program's function and return its one-line report, requiring exit code 2 and nothing else said."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def call(program, *arguments) -> str:
        with pytest.raises(SystemExit) as exit_info, report_user_errors():
            program(*arguments)
        assert exit_info.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error.strip()

    return call
