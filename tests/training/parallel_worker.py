# SPDX-License-Identifier: Apache-2.0
"""The layouts that `test_parallel_training` compares: prints each layout's losses and gradient norms.

`parallel_worker.py LAUNCHES`, a JSON list of [ranks, {layout: case}]: one after another, on as many forked ranks each.
"""

import contextlib
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from sparsek_megatron.data.datasets import build_datasets
from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.errors import UserError, write_whole_lines
from sparsek_megatron.training import parallel
from sparsek_megatron.training.arguments import TrainingConfig, parse
from sparsek_megatron.training.checkpoint import Checkpoints, load
from sparsek_megatron.training.engine import build_engine
from sparsek_megatron.training.loop import Trainer
from sparsek_megatron.training.model import build_model, token_losses
from sparsek_megatron.training.schedule import learning_rate
from sparsek_megatron.training.stopping import StopRequest
from sparsek_megatron.training.validate import data_paths

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS), str(TESTS / "distributed"), str(TESTS / "plugin")]

from cuda_to_cpu import cuda_to_cpu  # noqa: E402
from forked_ranks import run_ranks  # noqa: E402
from gloo_device import share_gloo_device  # noqa: E402

CHANGED = [
    "--weight-decay", "0.3", "--adam-beta1", "0.8", "--adam-beta2", "0.9", "--adam-eps", "1e-6",
    "--sparsek-lr-mult", "2", "--clip-grad", "0.25",
]  # fmt: skip


class Recorder:
    """A report that keeps the numbers and the lines and, of an engine given to it, a digest of its state each step."""

    def __init__(self):
        self.records = []
        self.lines = []
        self.digests = []
        self.engine = None

    def step(self, **record):
        self.records.append([record["loss"], record["grad_norm"]])
        if self.engine:
            self.digests.append(state_digest(self.engine))

    def validation(self, **record):
        self.records.append([record["loss"], 0.0])

    def line(self, text):
        self.lines.append(text)

    def checkpoint(self, **record):
        pass

    def restart_clock(self):
        pass


def state_digest(engine: Any) -> str:
    """SHA-256 of this rank's weights and optimizer state."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    tensors = [getattr(p, "ds_tensor", p).detach() for p in engine.module.parameters()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()


def make_nan(trainer: Trainer, rank: int | str, first: int, last: int) -> None:
    """Let the training loss of `rank` be NaN in optimizer steps `first` to `last`; "weights": those of every rank."""
    loss = trainer._loss

    def faulty(batch: dict[str, Any]) -> torch.Tensor:
        is_bad = trainer.engine.training and first <= trainer.engine.global_steps + 1 <= last
        if is_bad and rank == "weights":
            next(trainer.engine.module.parameters()).data.fill_(math.nan)
        return loss(batch) * (math.nan if is_bad and trainer.machine.rank == rank else 1.0)

    trainer._loss = faulty


def trajectory(
    argv: list[str], *, resume_at: int | None = None, start_at: int = 0, dump: str | None = None,
    nan_at: list[Any] | None = None,
) -> dict[str, Any]:
    """Losses and gradient norms of a run, and whether the weights that tensor-parallel ranks share are bitwise equal.

    With `resume_at`, the engine is rebuilt from that checkpoint midway; `start_at` is a checkpoint of --load that the
    run starts from; `dump` is a file for the state that it starts from. After either, "hyperparameters" are those of
    the optimizer's groups once the checkpoint is loaded by a run with the flags `CHANGED`. `nan_at` is (rank, first
    step, last step) of `make_nan`, until a run is resumed; "error" is what the run says then, should it fail.
    """
    config, _ = parse(argv)
    machine = parallel.initialize(config)
    tokenizer = SentencePieceTokenizer.load(config.tokenizer_model)
    recorder = Recorder()
    train_set, valid_set = build_datasets(
        data_paths(config), tokenizer, sequence_length=config.seq_length,
        train_samples=config.train_iters * config.global_batch_size,
        valid_samples=config.eval_iters * config.global_batch_size, seed=config.seed, cache=Path(config.save),
    )  # fmt: skip

    def engine_of(config: TrainingConfig) -> Any:
        torch.manual_seed(config.seed)
        engine, _ = build_engine(config, build_model(config, tokenizer.vocab_size, on_gpu=False), machine)
        return engine

    def trainer() -> Trainer:
        engine = engine_of(config)
        return Trainer(
            config, engine, machine, train_set=train_set, valid_set=valid_set, tokenizer_sha256=tokenizer.sha256,
            data={}, report=recorder,
        )  # fmt: skip

    first = trainer()
    if start_at:
        load(first.engine, config, machine, step=start_at)
    if dump:
        save_state(first.engine, machine, dump)
    reserved = remember_reserved(first.checkpoints)
    if nan_at:
        make_nan(first, *nan_at)
        recorder.engine = first.engine
    error = None
    try:
        first.train(start_at, StopRequest())
    except UserError as err:
        assert nan_at
        error = str(err)
    recorder.engine = None
    shared = shared_weights_are_equal(first.engine.module)
    buffers = first.checkpoints._snapshots._buffers.items()
    used = {key: buffer for key, buffer in buffers if key[0] != "rng" and buffer.dim()}  # numbers change their type
    if resume_at is not None:
        recorder.records.append("resumed")
        again = trainer()
        load(again.engine, config, machine, step=resume_at)
        again.train(resume_at, StopRequest())
    groups = largest_norm = None
    if saved := resume_at or start_at:
        changed, _ = parse([*argv, *CHANGED])
        engine = engine_of(changed)
        load(engine, changed, machine, step=saved)
        names = ("weight_decay", "betas", "eps", "lr_mult")
        groups = [{name: group[name] for name in names} for group in engine.optimizer.param_groups]
        largest_norm = getattr(engine.optimizer, "clip_grad", engine.gradient_clipping())
    parallel.shutdown()
    return {
        "records": recorder.records, "shared_weights_are_equal": shared, "hyperparameters": groups,
        "clip_grad": largest_norm, "lines": recorder.lines, "digests": recorder.digests, "error": error,
        "buffers": len(used), "reserved": sum(reserved.get(key) is buffer for key, buffer in used.items()),
    }  # fmt: skip


def remember_reserved(checkpoints: Checkpoints) -> dict[Any, torch.Tensor]:
    """Fills with the snapshots' buffers as `reserve` leaves them."""
    buffers: dict[Any, torch.Tensor] = {}
    reserve = checkpoints.reserve

    def remember() -> None:
        reserve()
        buffers.update(checkpoints._snapshots._buffers)

    checkpoints.reserve = remember
    return buffers


def save_state(engine: Any, machine: parallel.Machine, path: str) -> None:
    """Tensor-parallel shards of each parameter's weights, fp32 weights and moments, in rank order; Adam's steps."""
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    group = parallel_state.get_tensor_model_parallel_group()
    found = {}
    for name, parameter in engine.module.named_parameters():
        values = [parameter.detach(), safe_get_full_fp32_param(parameter)]
        values += [safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")]
        for key, value in zip(("weights", "fp32", "exp_avg", "exp_avg_sq"), values, strict=True):
            shards = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
            dist.all_gather(shards, value.contiguous(), group=group)
            found[f"{name}:{key}"] = shards
    state = engine.optimizer.optimizer.state
    steps = [float(state[flat]["step"]) for flat in engine.optimizer.single_partition_of_fp32_groups]
    if machine.is_first:
        torch.save({"shards": found, "steps": steps}, path)


def shared_weights_are_equal(model: torch.nn.Module) -> bool:
    """Whether parameters that are not sharded (norms, scorers) have the same bits on every tensor-parallel rank."""
    group = parallel_state.get_tensor_model_parallel_group()
    own = {n: p for n, p in model.named_parameters() if not getattr(p, "tensor_model_parallel", False)}
    with GatheredParameters([p for p in own.values() if hasattr(p, "ds_id")]):  # what ZeRO-3 has cut up
        mine = {n: p.tolist() for n, p in own.items()}
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group=group)
    return all(mine.values()) and len(mine) > 0 and all(each == mine for each in every)


def mcore_trajectory(argv: list[str]) -> dict[str, Any]:
    """The same run by megatron-core's own data parallelism and distributed optimizer, without DeepSpeed."""
    config, _ = parse(argv)
    machine = parallel.initialize(config)
    tokenizer = SentencePieceTokenizer.load(config.tokenizer_model)
    train_set, _ = build_datasets(
        data_paths(config), tokenizer, sequence_length=config.seq_length,
        train_samples=config.train_iters * config.global_batch_size, valid_samples=0, seed=config.seed,
        cache=Path(config.save),
    )  # fmt: skip
    torch.manual_seed(config.seed)
    with cuda_to_cpu():
        model = build_model(config, tokenizer.vocab_size, on_gpu=False)
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        wrapped = DistributedDataParallel(model.config, ddp, model)
        settings = OptimizerConfig(
            optimizer="adam", lr=config.lr, min_lr=0.0, weight_decay=config.weight_decay, clip_grad=config.clip_grad,
            adam_beta1=config.adam_beta1, adam_beta2=config.adam_beta2, adam_eps=config.adam_eps,
            use_distributed_optimizer=True,
        )  # fmt: skip
        optimizer = get_megatron_optimizer(settings, [wrapped])
        # Only its batches: the engine is never asked for.
        loop = Trainer.__new__(Trainer)
        loop.config, loop.machine, loop.global_batch = config, machine, config.global_batch_size
        loop._mpu, loop._data_parallel = (
            parallel.DeepSpeedMpu(),
            parallel_state.get_data_parallel_world_size(),
        )
        data = loop._batches(train_set, 0, config.train_iters)
        micro_batches = config.global_batch_size // (config.micro_batch_size * loop._data_parallel)
        records = []
        for step in range(config.train_iters):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
                group["weight_decay"] = config.weight_decay * group.get(
                    "wd_mult", 1.0
                )  # its scheduler's work
            wrapped.zero_grad_buffer()
            optimizer.zero_grad()
            total = torch.zeros(())
            for micro_batch in range(micro_batches):
                last = micro_batch == micro_batches - 1
                with contextlib.nullcontext() if last else wrapped.no_sync():
                    batch = next(data)
                    loss = (
                        token_losses(wrapped, batch["tokens"], batch["labels"]).float().mean() / micro_batches
                    )
                    loss.backward()
                total += loss.detach()
            finalize_model_grads([wrapped])
            updated, norm, _ = optimizer.step()
            assert updated
            records.append([loop._mean_over_ranks(total).item(), float(norm)])
    parallel.shutdown()
    return {"records": records}


def run(cases: dict[str, Any]) -> None:
    """This rank's part of `cases`; the first rank prints what they gave."""
    share_gloo_device()
    write_whole_lines()
    runs = {"deepspeed": trajectory, "mcore": mcore_trajectory}
    results = {}
    for name, case in cases.items():
        begun = time.perf_counter()
        results[name] = runs[case.pop("by", "deepspeed")](**case)
        results[name]["seconds"] = time.perf_counter() - begun
    if os.environ["RANK"] == "0":
        print("RESULTS " + json.dumps(results), flush=True)


if __name__ == "__main__":
    for ranks, cases in json.loads(sys.argv[1]):
        run_ranks(lambda cases=cases: run(cases), ranks)
