# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: DeepSpeed's own files for model and optimizer, each rank's RNG states, settings, a manifest.

Saving takes a snapshot in host memory and returns; `writer` brings it to the disk. Reading verifies checksums and
executes no pickled code.
"""

import contextlib
import dataclasses
import json
import pickle
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparsek_megatron.data.fingerprint import Fingerprint
from sparsek_megatron.errors import UserError
from sparsek_megatron.files import fsync_path
from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.manifest import check_contents, check_sizes
from sparsek_megatron.training.parallel import Machine
from sparsek_megatron.training.rng import restore_rng, rng_states
from sparsek_megatron.training.run_folder import (
    DERIVED,
    LATEST,
    RUN,
    candidates,
    checkpoint_name,
    number_type,
    read_run,
    same_layout,
)
from sparsek_megatron.training.snapshot import Snapshotter
from sparsek_megatron.training.writer import CheckpointWriter


class Checkpoints:
    """Saves the checkpoints of one run. Every rank has one and calls each method at the same steps.

    Each records the tokenizer and, by prefix, the data that the run began with; of the first rank's `data` alone.
    """

    def __init__(
        self, engine: Any, config: TrainingConfig, machine: Machine, *, tokenizer_sha256: str,
        data: Mapping[str, Fingerprint],
    ):  # fmt: skip
        self._engine = engine
        self._config = config
        self._machine = machine
        self._tokenizer_sha256 = tokenizer_sha256
        self._data = data
        self._snapshots = Snapshotter(machine.device)
        self._writer = CheckpointWriter(
            Path(config.save), machine, keep_last_n=config.keep_last_n,
            read_back=config.checkpoint_read_back, timeout_seconds=60 * config.distributed_timeout_minutes,
        )  # fmt: skip

    def save(self, step: int) -> float:
        """Begin the checkpoint of `step`; returns the seconds that training waited.

        Waits for the previous one first, should it still be under way.

        Raises:
            UserError: the disk is full or not writable; the previous checkpoint stays in force.
        """
        begun = time.perf_counter()
        self._writer.finish()
        folder = self._writer.folder(step)
        if self._machine.is_first:
            self._writer.clear()
        dist.barrier()
        files = self._snapshot(folder)
        states = rng_states(on_gpu=self._machine.on_gpu)
        files[_rng_file(self._machine.rank)] = self._snapshots.take("rng", states)
        if self._machine.is_first:
            self._write_settings(folder / RUN, step)
        self._writer.begin(step, files, ready=self._snapshots.wait)
        return time.perf_counter() - begun

    def reserve(self) -> None:
        """Take a snapshot that is not written; for when the optimizer has its state, after the first step.

        Its buffers serve every save: none then waits for memory to be pinned, and too little of it shows at once.
        """
        with tempfile.TemporaryDirectory() as folder:
            self._snapshot(Path(folder) / "unused")
        self._snapshots.wait()

    def _snapshot(self, folder: Path) -> dict[str, Any]:
        """DeepSpeed's files of this rank, name to contents, as copies in host memory; it makes the empty folder."""
        collected = _CollectingEngine(self._snapshots)
        self._engine.checkpoint_engine = collected
        self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        return collected.files

    def _write_settings(self, path: Path, step: int) -> None:
        settings = dataclasses.asdict(self._config) | {name: getattr(self._config, name) for name in DERIVED}
        run = {
            "step": step, "world_size": self._machine.world_size, "number_type": number_type(self._config),
            "tokenizer_sha256": self._tokenizer_sha256,
            "data": {prefix: dataclasses.asdict(each) for prefix, each in self._data.items()}, "settings": settings,
        }  # fmt: skip
        path.write_text(json.dumps(run, indent=1), encoding="utf-8")
        fsync_path(path)

    def before_update(self) -> None:
        """Call before the weights change: a snapshot under way on the GPU must finish first."""
        self._snapshots.before_update()

    def finish(self) -> None:
        """Wait until the last checkpoint is in force. Raises `UserError` as `save` does."""
        self._writer.finish()

    def news(self) -> list[str]:
        """Lines about checkpoints that have come into force."""
        return self._writer.news()


def choose(folder: Path, machine: Machine) -> int | None:
    """The newest intact checkpoint of `folder`, from `latest` down: every file has its checksum. None where none is.

    The ranks share the reading and agree. Each checkpoint that is passed over is named on the first rank.

    Raises:
        UserError: there are checkpoints, but none is intact.
    """
    found: list[Any] = [candidates(folder) if machine.is_first else None]
    dist.broadcast_object_list(found, src=0)
    steps, problem = found[0]
    problems = [problem] if problem else []
    for step in steps:
        path = folder / checkpoint_name(step)
        problem = check_sizes(path) or check_contents(path, share=machine.rank, shares=machine.world_size)
        told: list[Any] = [None] * machine.world_size
        dist.all_gather_object(told, problem)
        problem = next((each for each in told if each), None)
        if problem is None:
            break
        problems.append(f"{path}: {problem}")
    else:
        step = None
    if machine.is_first:
        for line in problems:
            print(f"warning: {line}; it is passed over", flush=True)
    if step is None and problems:
        raise UserError(f"--load {folder}: no checkpoint there is intact ({'; '.join(problems)[:400]})")
    return step


def load(engine: Any, config: TrainingConfig, machine: Machine, *, step: int) -> None:
    """Restore model and optimizer of the checkpoint of `step` in the --load folder, on every rank; in the layout and
    number type that it was saved in, RNG states too. Weight decay and what else this run's settings say about the
    optimizer stay, the norm that gradients are clipped to among them.

    Raises:
        UserError: a file of the checkpoint is missing or damaged.
    """
    folder = Path(config.load or "")
    path = folder / checkpoint_name(step)
    largest_norm = getattr(engine.optimizer, "clip_grad", None)
    with _readable(folder, step):
        if same_layout(config, machine.world_size, read_run(folder, step)):
            _load_as_saved(engine, path, machine)
        else:
            from sparsek_megatron.training.reshard import load_resharded

            load_resharded(engine, path, load_file=safe_load)
    if largest_norm is not None:  # ZeRO 1 and 2 take the checkpoint's
        engine.optimizer.clip_grad = largest_norm


def _load_as_saved(engine: Any, path: Path, machine: Machine) -> None:
    engine.checkpoint_engine = _LoadingEngine()
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name, load_lr_scheduler_states=False)
    if loaded is None:
        raise FileNotFoundError("incomplete")
    restore_rng(safe_load(path / _rng_file(machine.rank)), on_gpu=machine.on_gpu)


def safe_load(path: str | Path, map_location: Any = "cpu", *, mmap: bool = False) -> Any:
    """`torch.load` that executes no pickled code: tensors, plain data, and DeepSpeed's own plain data classes."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)


def why_unreadable(err: Exception) -> str:
    """One short line of what `safe_load` raised; of torch's refusals, what follows its advice."""
    reason = str(err).partition("WeightsUnpickler error: ")[2] or str(err)
    return " ".join(reason.split())[:160]


def _rng_file(rank: int) -> str:
    return f"rng_rank_{rank:05d}.pt"


@contextlib.contextmanager
def _readable(folder: Path, step: int) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as err:
        raise UserError(
            f"--load {folder}: the checkpoint of step {step} cannot be read ({why_unreadable(err)}); "
            f"write the name of an older one into {folder / LATEST}"
        ) from err


class _CollectingEngine:
    """DeepSpeed's way to write a file: here a snapshot, left in `files` for the background writer."""

    def __new__(cls, snapshots: Snapshotter) -> Any:
        from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

        class Engine(TorchCheckpointEngine):
            def __init__(self) -> None:
                super().__init__()
                self.files: dict[str, Any] = {}

            def save(self, state_dict: Any, path: str) -> None:
                name = Path(path).name
                self.files[name] = snapshots.take(name, state_dict)

        return Engine()


class _LoadingEngine:
    """DeepSpeed's way to read a file: `safe_load`."""

    def __new__(cls) -> Any:
        from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

        class Engine(TorchCheckpointEngine):
            def load(self, path: str, map_location: Any = None) -> Any:
                return safe_load(path, map_location)

        return Engine()
