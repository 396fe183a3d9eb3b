# SPDX-License-Identifier: Apache-2.0
"""One process of a training run: groups, model, engine, checkpoint, data, loop."""

import os
from pathlib import Path

import torch

from sparsek_megatron.data.datasets import build_datasets, validation_entropy
from sparsek_megatron.data.fingerprint import Fingerprint, changed_data, fingerprint
from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.files import lock_folder, require_free_space
from sparsek_megatron.liveness import Liveness
from sparsek_megatron.training import checkpoint, parallel
from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.engine import build_engine
from sparsek_megatron.training.flops import flops_per_token, peak_tflops
from sparsek_megatron.training.loop import Trainer
from sparsek_megatron.training.model import build_model, uses_bf16
from sparsek_megatron.training.report import Report
from sparsek_megatron.training.run_folder import changed_settings, check_resume, read_run
from sparsek_megatron.training.stopping import StopRequest
from sparsek_megatron.training.validate import data_paths

_BYTES_PER_PARAMETER = 16  # weights, fp32 master copy, two Adam moments, and room for the renamed predecessor


def run(config: TrainingConfig) -> None:
    """Train as this process's rank of the run; the settings have been checked.

    Raises:
        UserError: what only shows once the run is under way.
    """
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with StopRequest() as stop:
        machine = parallel.initialize(config)
        # Until the data is there, a rank may be silent for half as long as collectives wait: numpy shuffles a huge
        # corpus's index with the interpreter lock held (68 s for 4e8 entries). One that dies is named before they end.
        patience = max(60.0, 30.0 * config.distributed_timeout_minutes)
        liveness = Liveness(machine.store, machine.rank, machine.world_size, start_timeout_seconds=patience)
        with parallel.end_together(machine), liveness:
            _train(config, machine, stop, liveness)
        parallel.shutdown()


def _train(config: TrainingConfig, machine: parallel.Machine, stop: StopRequest, liveness: Liveness) -> None:
    lock = lock_folder(Path(config.save), "--save") if machine.is_first else None
    tokenizer = SentencePieceTokenizer.load(config.tokenizer_model)
    model = build_model(config, tokenizer.vocab_size, on_gpu=machine.on_gpu)
    own_parameters = sum(p.numel() for p in model.parameters())
    if machine.is_first:
        needed = own_parameters * config.tensor_model_parallel_size * _BYTES_PER_PARAMETER
        require_free_space(Path(config.save), needed, "--save")
    engine, optimizer = build_engine(config, model, machine)
    chosen = checkpoint.choose(Path(config.load), machine) if config.load else None
    start = check_resume(config, machine.world_size, tokenizer, step=chosen) or 0
    if start:
        checkpoint.load(engine, config, machine, step=start)
    paths = data_paths(config)
    data_parallel = config.data_parallel_size(machine.world_size)
    batch = config.global_batch_size or config.micro_batch_size * data_parallel
    data = {prefix: fingerprint(prefix) for prefix in paths.prefixes()} if machine.is_first else {}
    train_set, valid_set = build_datasets(
        paths,
        tokenizer,
        sequence_length=config.seq_length,
        train_samples=config.train_iters * batch,
        valid_samples=config.eval_iters * batch,
        seed=config.seed,
        cache=Path(config.data_cache_path or Path(config.save) / "data_cache"),
    )
    liveness.started()
    report = None
    if machine.is_first:
        _introduce(config, machine, own_parameters, optimizer, start, data)
        report = Report(
            config,
            start=start,
            tokens_per_step=batch * config.seq_length,
            peak_flops=_peak_flops(config, machine),
            flops_per_token=flops_per_token(config, config.padded_vocab_size(tokenizer.vocab_size)),
            entropy=validation_entropy(paths, tokenizer.vocab_size),
        )
    trainer = Trainer(
        config, engine, machine, train_set=train_set, valid_set=valid_set, tokenizer_sha256=tokenizer.sha256,
        data=data, report=report,
    )  # fmt: skip
    try:
        trainer.train(start, stop)
    finally:
        if report:
            report.close()
    if lock:
        lock.close()


def _peak_flops(config: TrainingConfig, machine: parallel.Machine) -> float | None:
    """bfloat16 operations per second of all GPUs together; None where it is not known, or the run is in float32."""
    if not uses_bf16(config, on_gpu=machine.on_gpu) or not machine.on_gpu:
        return None
    peak = config.peak_tflops or peak_tflops(torch.cuda.get_device_name())
    return peak * 1e12 * machine.world_size if peak else None


def _introduce(
    config: TrainingConfig, machine: parallel.Machine, own_parameters: int, optimizer: str, start: int,
    data: dict[str, Fingerprint],
) -> None:  # fmt: skip
    device = f"GPU ({torch.cuda.get_device_name()})" if machine.on_gpu else "CPU"
    backend = "NCCL, Triton kernels" if machine.on_gpu else "gloo, torch kernels"
    precision = "bf16" if uses_bf16(config, on_gpu=machine.on_gpu) else "fp32"
    tp = config.tensor_model_parallel_size
    sequence = " with sequence parallelism" if config.sequence_parallel else ""
    print(
        f"{machine.world_size} x {device}: {backend}, {precision}, TP={tp}{sequence}, "
        f"CP={config.context_parallel_size}, DP={config.data_parallel_size(machine.world_size)}, "
        f"ZeRO-{config.zero_stage}, {optimizer}, {own_parameters / 1e6:.2f}M parameters on each rank",
        flush=True,
    )
    if start >= config.train_iters:
        print(f"{config.load}: already at step {start} of {config.train_iters}; nothing left to train", flush=True)
    elif start:
        print(f"resuming {config.load} from step {start}", flush=True)
        recorded = read_run(config.load or "", start).get("data", {})
        before = {prefix: Fingerprint(**each) for prefix, each in recorded.items()}
        changed = changed_data(data_paths(config), before, data, step=start)
        for line in (*changed_settings(config, start), *changed):
            print(line, flush=True)
