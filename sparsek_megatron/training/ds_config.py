# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's configuration: made from the run's settings, or a user's JSON file whose "auto" values they fill."""

import difflib
import json
from pathlib import Path
from typing import Any

from sparsek_megatron.errors import UserError
from sparsek_megatron.training.arguments import TrainingConfig

AUTO = "auto"
_NEVER = 10**9
# Elements. DeepSpeed's own 5e8 leaves most gradients of a shard of a 1.3B model for after the backward pass.
_REDUCE_BUCKET = 50_000_000

# Settings that the run's flags decide: a file may leave them out, say "auto", or repeat the flag's value.
OWNED = {
    "train_batch_size": "--global-batch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch-size",
    "gradient_accumulation_steps": "--global-batch-size",
    "gradient_clipping": "--clip-grad",
    "zero_optimization.stage": "--zero-stage",
    "zero_optimization.offload_optimizer.device": "--offload-optimizer",
    "bf16.enabled": "--bf16",
}
# Settings that train wrongly, or not at all, under Megatron's parallelism or this loop.
_ROUNDS = "gradients are averaged in the type that they add up in: otherwise norms and losses differ from one process's"
_SKIPS = "a step whose gradient is not finite is skipped and counted by its norm"
REFUSED = {
    "optimizer": "this program builds the optimizer from its own flags (--lr, --adam-beta1, --weight-decay)",
    "scheduler": "the learning rate follows --lr-decay-style, which needs no state to resume",
    "fp16": "weights are bfloat16 or float32 here; use --bf16",
    "amp": "weights are bfloat16 or float32 here; use --bf16",
    "sequence_parallel_size": "DeepSpeed's sequence parallelism (Ulysses) beside Megatron's doubles the gradients; "
    "use --sequence-parallel",
    "tensor_parallel": "layers are sharded by Megatron; use --tensor-model-parallel-size",
    "pipeline": "DeepSpeed's pipeline engine refuses ZeRO 2 and 3, and mcore's schedules bypass DeepSpeed's backward",
    "elasticity": "the global batch is a setting of the run; start other numbers of processes and resume",
    "communication_data_type": _ROUNDS,
    "prescale_gradients": _ROUNDS,
    "gradient_predivide_factor": _ROUNDS,
    "gradient_allreduce_op": _ROUNDS,
    "managed_gradient_accumulation": "the training loop says where a batch ends",
    "data_types": "gradients of a step's micro-batches add up in float32",
    "torch_autocast": "weights are bfloat16 or float32 here; use --bf16",
    "checkpoint": "checkpoints are this program's own, with checksums; see --save and --checkpoint-read-back",
    "bf16.check_grad_overflow": _SKIPS,
    "zero_optimization.compute_grad_norm": _SKIPS,
    "zero_optimization.cpu_offload": "an old name; use --offload-optimizer",
    "zero_optimization.offload_param": "parameters stay on the GPU here; use --zero-stage 3 without it",
    "zero_optimization.elastic_checkpoint": "checkpoints change layout without it",
    "zero_optimization.round_robin_gradients": "it reorders the partitions that a checkpoint is cut into",
}
_TOP_LEVEL = sorted({key.partition(".")[0] for key in (*OWNED, *REFUSED)})


def build_ds_config(config: TrainingConfig, *, data_parallel: int, bf16: bool, overlap: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for a run of `data_parallel` ranks.

    Raises:
        UserError: --deepspeed-config cannot be read, or contradicts the run.
    """
    per_pass = config.micro_batch_size * data_parallel
    batch = config.global_batch_size or per_pass
    zero: dict[str, Any] = {"stage": config.zero_stage, "overlap_comm": overlap}
    if config.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = 10_000
    else:
        zero["reduce_bucket_size"] = _REDUCE_BUCKET
    zero["offload_optimizer"] = {"device": "cpu" if config.offload_optimizer else "none", "pin_memory": overlap}
    ours = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": batch // per_pass,
        "gradient_clipping": config.clip_grad,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # The client optimizer is DeepSpeedCPUAdam where the state is offloaded: see engine.build_optimizer.
        "bf16": {"enabled": bf16},
        "steps_per_print": _NEVER,
        **_sums(config, batch // per_pass, bf16=bf16),
        # Its timer waits for the whole device twice a step, and so for copies of a checkpoint that are under way.
        "timers": {"throughput": {"enabled": False}},
        "wall_clock_breakdown": False,
    }
    if config.deepspeed_config:
        ours = _merged(config.deepspeed_config, _read(config.deepspeed_config), ours, "")
    if "data_types" in ours and config.zero_stage == 1 and data_parallel * config.context_parallel_size == 1:
        # One rank: the stages give the same bits. ZeRO-1 copies its sums into a partition at the end of a step's last
        # backward and holds both by then, ZeRO-2 adds up in the partition.
        ours["zero_optimization"] = {**ours["zero_optimization"], "stage": 2}
    # DeepSpeed takes context-parallel ranks for data-parallel ones, which its gradients are averaged over too.
    return {**ours, "train_batch_size": batch * config.context_parallel_size}


def _sums(config: TrainingConfig, micro_batches: int, *, bf16: bool) -> dict[str, Any]:
    """What lets the gradients of a step's micro-batches add up in fp32: see zero_accumulation.

    A single micro-batch adds nothing up: its gradients stay in the weights' type, at half the memory and traffic.
    """
    if not bf16 or micro_batches <= 1:
        return {}
    if config.zero_stage == 0:
        raise UserError(
            f"--zero-stage 0: the gradients of {micro_batches} micro-batches a step would add up in bfloat16, for "
            "DeepSpeed has no other way there; use --zero-stage 1"
        )
    return {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


def _read(path: str) -> dict[str, Any]:
    try:
        loaded = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as err:
        raise UserError(f"--deepspeed-config {path}: cannot be read ({err.strerror}); check the path") from None
    except ValueError as err:
        raise UserError(f"--deepspeed-config {path}: not valid JSON ({err}); mend the file") from None
    if not isinstance(loaded, dict):
        raise UserError(f"--deepspeed-config {path}: must hold an object of DeepSpeed's settings")
    return loaded


def _merged(path: str, theirs: dict[str, Any], ours: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The file's settings with "auto" filled in, over ours."""
    merged = dict(ours)
    for name, value in theirs.items():
        key = prefix + name
        if key in REFUSED:
            raise UserError(f"--deepspeed-config {path}: {key}: {REFUSED[key]}; leave it out")
        nearest = difflib.get_close_matches(name, _TOP_LEVEL, n=1, cutoff=0.8) if not prefix else []
        if nearest and name not in _TOP_LEVEL:  # DeepSpeed ignores a name that it does not know
            raise UserError(f"--deepspeed-config {path}: {key}: unknown; did you mean {nearest[0]}?")
        if value == AUTO:
            if name not in ours:
                raise UserError(f'--deepspeed-config {path}: {key}: this program has no value for "auto"; give one')
        elif isinstance(value, dict) and isinstance(ours.get(name, {}), dict):
            merged[name] = _merged(path, value, ours.get(name, {}), f"{key}.")
        elif isinstance(ours.get(name), dict):
            raise UserError(f"--deepspeed-config {path}: {key}: {value!r} is no object; write {{...}} or leave it out")
        elif key in OWNED and value != ours[name]:
            raise UserError(
                f'--deepspeed-config {path}: {key}: {value!r}, but this run has {ours[name]!r}; write "auto" there or '
                f"change {OWNED[key]}"
            )
        else:
            merged[name] = value
    return merged
