# SPDX-License-Identifier: Apache-2.0
"""Checks across settings, before any process group, model or file exists."""

import math
from pathlib import Path

from sparsek_megatron.config import SparseKConfig
from sparsek_megatron.data.paths import DataPaths, check_data
from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.errors import UserError, refusals_for_the_user
from sparsek_megatron.files import require_writable_folder
from sparsek_megatron.recompute import check_recomputed_inputs
from sparsek_megatron.training.arguments import TrainingConfig, flag_of
from sparsek_megatron.training.ds_config import build_ds_config
from sparsek_megatron.training.run_folder import check_resume

_RANGES = (
    (
        "must be at least 1", lambda x: x >= 1,
        ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "tensor_model_parallel_size",
         "micro_batch_size", "train_iters", "eval_interval", "log_interval", "save_interval",
         "distributed_timeout_minutes", "make_vocab_size_divisible_by", "rotary_base", "ffn_hidden_size",
         "num_query_groups", "kv_channels", "global_batch_size", "exit_interval", "lr_decay_iters",
         "max_position_embeddings", "mlp_tile_tokens"),
    ),
    (
        "must be at least 0, and finite", lambda x: 0 <= x < math.inf,
        ("lr", "min_lr", "weight_decay", "clip_grad", "lr_warmup_iters", "num_workers", "keep_last_n",
         "hang_timeout_seconds", "max_skipped_steps", "eval_iters"),
    ),
    (
        "must be above 0, and finite", lambda x: 0 < x < math.inf,
        ("adam_eps", "norm_epsilon", "init_method_std", "peak_tflops"),
    ),
    ("must be at least 0 and below 1", lambda x: 0 <= x < 1, ("adam_beta1", "adam_beta2")),
    ("must be at least 0 and below 2^32", lambda x: 0 <= x < 2**32, ("seed",)),  # what NumPy's generator takes
)  # fmt: skip


def check_run(config: TrainingConfig, world_size: int, *, on_gpu: bool) -> None:
    """Everything that can be known before the run starts.

    Raises:
        UserError: naming the flag, its value and the fix.
    """
    check_ranges(config)
    check_parallelism(config, world_size)
    check_precision(config, on_gpu=on_gpu)
    check_deepspeed(config, world_size, on_gpu=on_gpu)
    sparsek_config(config)
    tokenizer = SentencePieceTokenizer.load(config.tokenizer_model)
    check_data(data_paths(config), tokenizer, config.tokenizer_model)
    check_resume(config, world_size, tokenizer)
    require_writable_folder(Path(config.save), "--save")


def data_paths(config: TrainingConfig) -> DataPaths:
    """The data flags, validation data left out where nothing is validated.

    Raises:
        UserError: they contradict each other.
    """
    if config.data_path and (config.train_data_path or config.valid_data_path):
        raise UserError("--data-path and --train-data-path/--valid-data-path exclude each other; give one form")
    if config.train_data_path and not config.valid_data_path and config.eval_iters:
        raise UserError(
            "--train-data-path needs --valid-data-path beside it, or use --data-path with --split, or --eval-iters 0"
        )
    if config.valid_data_path and not config.train_data_path:
        raise UserError("--valid-data-path needs --train-data-path beside it, or use --data-path with --split")
    valid = config.valid_data_path if config.eval_iters else ()
    return DataPaths(config.data_path, config.split, config.train_data_path, valid)


def check_ranges(config: TrainingConfig) -> None:
    """Single values."""
    for rule, holds, names in _RANGES:
        for name in names:
            value = getattr(config, name)
            if value is not None and not holds(value):
                raise UserError(f"{flag_of(name)} {value}: {rule}")
    if not 1 <= config.recompute_num_layers <= config.num_layers:
        raise UserError(
            f"--recompute-num-layers {config.recompute_num_layers}: must be between 1 and --num-layers "
            f"{config.num_layers}"
        )
    if config.recompute_method == "uniform" and config.num_layers % config.recompute_num_layers:
        raise UserError(
            f"--recompute-num-layers {config.recompute_num_layers}: with --recompute-method uniform it must divide "
            f"--num-layers {config.num_layers}"
        )
    if config.loss_chunk_tokens is not None and config.loss_chunk_tokens < 0:
        raise UserError(f"--loss-chunk-tokens {config.loss_chunk_tokens}: must be at least 1, or 0 for whole logits")
    offloaded = config.cpu_offloading_num_layers
    if not 0 <= offloaded <= config.num_layers:
        raise UserError(
            f"--cpu-offloading-num-layers {offloaded}: must be between 0 and --num-layers {config.num_layers}"
        )
    if offloaded and config.recompute_granularity != "full":
        raise UserError(
            f"--cpu-offloading-num-layers {offloaded}: keeps the checkpoints of full recompute; add "
            "--recompute-granularity full"
        )
    with refusals_for_the_user():
        check_recomputed_inputs(config, count=config.recompute_inputs, num_layers=offloaded)
    heads, groups = config.num_attention_heads, config.query_groups
    if heads % groups:
        raise UserError(
            f"--num-query-groups {groups}: does not divide --num-attention-heads {heads}; "
            f"use one of {', '.join(str(d) for d in range(1, heads + 1) if heads % d == 0)}"
        )
    if config.kv_channels is None and config.hidden_size % heads:
        raise UserError(
            f"--hidden-size {config.hidden_size}: not divisible by --num-attention-heads {heads}; "
            "change one of them or give --kv-channels"
        )
    if config.head_dim % 2:
        raise UserError(f"--kv-channels {config.head_dim}: rotary embedding needs an even head size")


def check_parallelism(config: TrainingConfig, world_size: int) -> None:
    """Parallel sizes against each other, the model and the number of processes."""
    tp = config.tensor_model_parallel_size
    if config.pipeline_model_parallel_size != 1:
        raise UserError(
            f"--pipeline-model-parallel-size {config.pipeline_model_parallel_size}: this trainer runs on DeepSpeed's "
            "engine, which has no pipeline under ZeRO; use 1, or Megatron's own trainer with the layer spec"
        )
    if world_size % tp:
        raise UserError(
            f"--tensor-model-parallel-size {tp}: does not divide the {world_size} processes started; "
            f"start a multiple of {tp} processes (--nproc-per-node) or change it"
        )
    check_context_parallelism(config, world_size)
    for name, count in (
        ("num_attention_heads", config.num_attention_heads), ("num_query_groups", config.query_groups),
        ("ffn_hidden_size", config.mlp_width),
    ):  # fmt: skip
        if count % tp:
            raise UserError(f"{flag_of(name)} {count}: not divisible by --tensor-model-parallel-size {tp}")
    if config.sequence_parallel:
        if tp == 1:
            raise UserError("--sequence-parallel: needs --tensor-model-parallel-size above 1; leave it out")
        if config.seq_length % tp:
            raise UserError(
                f"--seq-length {config.seq_length}: not divisible by --tensor-model-parallel-size {tp} "
                f"under --sequence-parallel; use a multiple of {tp}"
            )
    elif config.async_tensor_parallel:
        raise UserError(
            "--async-tensor-parallel: overlaps what sequence parallelism sends; add --sequence-parallel and a "
            f"--tensor-model-parallel-size above 1 (it is {tp}), or leave it out"
        )
    data_parallel = config.data_parallel_size(world_size)
    step = config.micro_batch_size * data_parallel
    if config.global_batch_size is not None and config.global_batch_size % step:
        raise UserError(
            f"--global-batch-size {config.global_batch_size}: not a multiple of --micro-batch-size "
            f"{config.micro_batch_size} x {data_parallel} data-parallel ranks = {step}"
        )


def check_context_parallelism(config: TrainingConfig, world_size: int) -> None:
    """The context-parallel size against the processes, the sequence and, for a2a, the KV heads."""
    tp, cp = config.tensor_model_parallel_size, config.context_parallel_size
    if cp < 1 or world_size % (tp * cp):
        raise UserError(
            f"--context-parallel-size {cp}: times --tensor-model-parallel-size {tp} it does not divide the "
            f"{world_size} processes started; start a multiple of {tp * max(cp, 1)} (--nproc-per-node) or change it"
        )
    if cp == 1:
        return
    unit = 2 * cp * (tp if config.sequence_parallel else 1)
    if config.seq_length % unit:
        sharers = f"2 x --context-parallel-size {cp}" + (f" x {tp} for --sequence-parallel" if unit > 2 * cp else "")
        raise UserError(
            f"--seq-length {config.seq_length}: not divisible by {sharers}; use {-(-config.seq_length // unit) * unit}"
        )
    heads = config.query_groups // tp
    if config.cp_comm_type == "a2a" and heads % cp:
        raise UserError(
            f"--cp-comm-type a2a: {heads} KV heads on a rank do not divide by --context-parallel-size {cp}; use p2p"
        )


def check_precision(config: TrainingConfig, *, on_gpu: bool) -> None:
    """Number format against device and ZeRO stage."""
    if config.bf16 and not on_gpu:
        raise UserError("--bf16: on CPU this trainer runs in float32; leave it out")
    bf16 = on_gpu if config.bf16 is None else config.bf16
    if bf16 and config.zero_stage == 0 and config.tensor_model_parallel_size > 1:
        raise UserError(
            "--zero-stage 0: with bf16 and tensor parallelism DeepSpeed clips by a wrong gradient norm; "
            "use --zero-stage 1"
        )


def check_deepspeed(config: TrainingConfig, world_size: int, *, on_gpu: bool) -> None:
    """ZeRO's own settings and the user's JSON file."""
    if config.offload_optimizer and config.zero_stage == 0:
        raise UserError("--offload-optimizer: needs a partitioned optimizer; use --zero-stage 1, 2 or 3")
    if config.mlp_tile_tokens and config.zero_stage == 3:
        raise UserError(
            f"--mlp-tile-tokens {config.mlp_tile_tokens}: under ZeRO-3 no tile would find the whole weights; "
            "use --zero-stage 1 or 2, or leave it out"
        )
    bf16 = on_gpu if config.bf16 is None else config.bf16
    build_ds_config(config, data_parallel=config.data_parallel_size(world_size), bf16=bf16, overlap=on_gpu)


def sparsek_config(config: TrainingConfig) -> SparseKConfig:
    """The attention's settings; raises `UserError` for one that is out of range."""
    for name in ("topk", "window", "stride"):
        value = getattr(config, f"sparsek_{name}")
        if not 1 <= value <= config.seq_length:
            raise UserError(
                f"--sparsek-{name} {value}: must be between 1 and --seq-length {config.seq_length}"
            )
    topk, pool = config.sparsek_topk, config.sparsek_pool
    if config.sparsek_hard_selection:
        if pool not in (None, topk):
            raise UserError(f"--sparsek-pool {pool}: with --sparsek-hard-selection it must equal topk; leave it out")
    elif pool is not None and pool <= topk:
        raise UserError(
            f"--sparsek-pool {pool}: must be above --sparsek-topk {topk} so that the scorer gets a gradient; "
            f"use {4 * topk}, or ask for hard selection with --sparsek-hard-selection"
        )
    try:
        return SparseKConfig(
            topk=topk,
            window=config.sparsek_window,
            stride=config.sparsek_stride,
            pool=pool,
            gate=config.sparsek_gate,
            hard_selection=config.sparsek_hard_selection,
            initial_slope=config.sparsek_initial_slope,
            scorer_lr_mult=config.sparsek_lr_mult,
        )
    except ValueError as err:
        field, _, problem = str(err).partition("=")  # it says field=value: what is wrong
        raise UserError(f"{flag_of('sparsek_' + field.removeprefix('scorer_'))} {problem}") from None
