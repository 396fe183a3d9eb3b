# SPDX-License-Identifier: Apache-2.0
"""The programs as a user starts them, on prepared data, with no process left behind whatever happens."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
LONGEST_SECONDS = 240


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
        data = [
            "--tokenizer-model",
            self.tokenizer,
            "--train-data-path",
            self.train,
            "--valid-data-path",
            self.valid,
        ]
        model = (
            "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --seq-length 64 "
            "--sparsek-topk 8 --sparsek-window 8 --sparsek-stride 4 --micro-batch-size 2 --train-iters 8 --lr 1e-2 "
            "--eval-interval 4 --eval-iters 2 --save-interval 3 --log-interval 1"
        )
        return [*model.split(), *data, "--save", str(save)]


# On CPU nothing is compiled. megatron-core's decorators would still load torch's compiler: 2 s of each process.
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}


def environment(*, gpu: bool = False) -> dict[str, str]:
    """The environment of a started program: one thread each, no launcher's variables, and no GPU unless asked."""
    left_out = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return kept | {"OMP_NUM_THREADS": "1"} | ({} if gpu else ON_CPU)


def start(script: str, *arguments: str, **options) -> subprocess.Popen:
    """Start an example."""
    return _start(str(REPOSITORY / "examples" / script), *arguments, **options)


def start_program(path: str, *arguments: str, **options) -> subprocess.Popen:
    """Start `python path`."""
    return _start(path, *arguments, **options)


def start_script(script: str, *arguments: str, **variables: str) -> subprocess.Popen:
    """Start a shell script of the repository, with this Python and further variables of the environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        [str(REPOSITORY / script), *arguments], env=environment() | {"PATH": path} | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def start_code(code: str) -> subprocess.Popen:
    """Start `python -c code`."""
    return _start("-c", code)


def _start(*command: str, gpu: bool = False, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command], env=environment(gpu=gpu), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def finish(process: subprocess.Popen, *, code: int = 0, seconds: float = LONGEST_SECONDS) -> str:
    """Wait for a program, require its exit code, and return what it printed."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise
    assert process.returncode == code, output
    return output


def read_results(output: str) -> dict[str, Any]:
    """What the launches of a worker found, by case: their lines of RESULTS."""
    lines = [line.removeprefix("RESULTS ") for line in output.splitlines() if line.startswith("RESULTS ")]
    return {name: result for line in lines for name, result in json.loads(line).items()}


def run(script: str, *arguments: str, code: int = 0, **options) -> str:
    """Run an example to its end."""
    return finish(start(script, *arguments, **options), code=code)


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to a launcher and to its workers, which have sessions of their own, and what they have started."""
    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that writes a file may have ended
            each.kill()
    process.communicate()
