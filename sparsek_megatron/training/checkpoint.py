# SPDX-License-Identifier: Apache-2.0
"""Writing and reading checkpoints: DeepSpeed's own files for model and optimizer, and each rank's RNG states.

A checkpoint is written under a hidden name, flushed, renamed, and only then named by `latest`: it is complete or
absent, and a kill at any moment leaves the previous one in force.
"""

import contextlib
import dataclasses
import json
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from sparsek_megatron.errors import UserError, describe_os_error
from sparsek_megatron.files import atomic_write, fsync_path, publish
from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.parallel import Machine
from sparsek_megatron.training.run_folder import DERIVED, LATEST, NAME, checkpoint_name, latest_step

_PARTIAL = ".partial-"


def save(engine: Any, config: TrainingConfig, machine: Machine, *, step: int, tokenizer_sha256: str) -> Path:
    """Write the checkpoint of `step` and make it the latest. Call it on every rank.

    Raises:
        UserError: the disk is full or not writable; the previous checkpoint stays in force.
    """
    root = Path(config.save)
    final, partial = root / checkpoint_name(step), root / (_PARTIAL + checkpoint_name(step))
    if machine.is_first:
        for stale in root.glob(_PARTIAL + "*"):
            shutil.rmtree(stale, ignore_errors=True)
    dist.barrier()
    try:
        engine.checkpoint_engine = _SafeCheckpointEngine()
        engine.save_checkpoint(str(root), tag=partial.name, save_latest=False)
        rng = partial / f"rng_rank_{machine.rank:05d}.pt"
        with open(rng, "wb") as stream:
            torch.save(_rng_states(machine), stream)
        if machine.is_first:
            settings = dataclasses.asdict(config) | {n: getattr(config, n) for n in DERIVED}
            run = {
                "step": step, "world_size": machine.world_size, "tokenizer_sha256": tokenizer_sha256,
                "settings": settings,
            }  # fmt: skip
            with open(partial / "run.json", "w", encoding="utf-8") as stream:
                json.dump(run, stream, indent=1)
            fsync_path(partial / "run.json")
        fsync_path(rng)
        dist.barrier()
        if machine.is_first:
            fsync_path(partial)
            if final.exists():
                shutil.rmtree(final)
            publish(partial, final)
            with atomic_write(root / LATEST) as stream:
                stream.write(final.name)
            _prune(root, config.keep_last_n)
    except (OSError, RuntimeError) as err:
        reason = _disk_problem(err)
        if reason is None:
            raise
        shutil.rmtree(partial, ignore_errors=True)
        good = latest_step(root)
        kept = f"the checkpoint of step {good} is intact" if good is not None else "there is no earlier checkpoint"
        raise UserError(f"--save {config.save}: checkpoint of step {step} not written: {reason} ({kept})") from err
    dist.barrier()
    return final


def _disk_problem(err: BaseException) -> str | None:
    """The file-system error in an exception's chain; torch.save wraps it in a RuntimeError of its own."""
    seen: BaseException | None = err
    while seen is not None:
        if isinstance(seen, OSError):
            return describe_os_error(seen, "the checkpoint")
        seen = seen.__cause__ or seen.__context__
    return None


def _prune(root: Path, keep: int) -> None:
    if keep:
        steps = sorted(path for path in root.iterdir() if NAME.fullmatch(path.name))
        for old in steps[:-keep]:
            shutil.rmtree(old, ignore_errors=True)


def load(engine: Any, config: TrainingConfig, machine: Machine, *, step: int) -> None:
    """Restore model, optimizer and RNG states of the checkpoint of `step` in the --load folder, on every rank.

    Raises:
        UserError: a file of the checkpoint is missing or damaged.
    """
    folder = Path(config.load or "")
    engine.checkpoint_engine = _SafeCheckpointEngine()
    with _readable(folder, step):
        path, _ = engine.load_checkpoint(str(folder), tag=checkpoint_name(step), load_lr_scheduler_states=False)
        if path is None:
            raise FileNotFoundError("incomplete")
        states = torch.load(folder / checkpoint_name(step) / f"rng_rank_{machine.rank:05d}.pt", weights_only=True)
    _restore_rng(states, machine)


def load_model(model: torch.nn.Module, folder: Path, *, step: int) -> None:
    """Restore this tensor-parallel rank's weights alone, without DeepSpeed.

    Raises:
        UserError: a file is missing or damaged.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    with _readable(folder, step):
        state = _safe_load(folder / checkpoint_name(step) / f"mp_rank_{rank:02d}_model_states.pt", "cpu")
        model.load_state_dict(state["module"])


@contextlib.contextmanager
def _readable(folder: Path, step: int) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as err:
        raise UserError(
            f"--load {folder}: the checkpoint of step {step} cannot be read ({' '.join(str(err).split())[:160]}); "
            f"write the name of an older one into {folder / LATEST}"
        ) from err


def _safe_load(path: str | Path, map_location: Any) -> Any:
    with torch.serialization.safe_globals(_deepspeed_classes()):
        return torch.load(path, map_location=map_location, weights_only=True)


class _SafeCheckpointEngine:
    """How DeepSpeed reads and writes a file here: durable writes, and reads that execute no pickled code."""

    def __new__(cls) -> Any:
        from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

        class Engine(TorchCheckpointEngine):
            def save(self, state_dict: Any, path: str) -> None:
                with open(path, "wb") as stream:
                    torch.save(state_dict, stream)
                fsync_path(Path(path))

            def load(self, path: str, map_location: Any = None) -> Any:
                return _safe_load(path, map_location)

        return Engine()


def _deepspeed_classes() -> list[Any]:
    """The plain data classes that DeepSpeed pickles into its optimizer files."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def _tracker() -> Any:
    return tensor_parallel.get_cuda_rng_tracker()


def _rng_states(machine: Machine) -> dict[str, Any]:
    version, keys, gauss = random.getstate()
    name, numbers, position, has_gauss, cached = np.random.get_state()
    states: dict[str, Any] = {
        "python": (version, list(keys), gauss),
        "numpy": (name, torch.from_numpy(np.asarray(numbers).copy()), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "tracker": _tracker().get_states(),
    }
    if machine.on_gpu:
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_rng(states: dict[str, Any], machine: Machine) -> None:
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numbers, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, numbers.numpy(), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    _tracker().set_states(states["tracker"])
    if machine.on_gpu:
        torch.cuda.set_rng_state(states["cuda"])
