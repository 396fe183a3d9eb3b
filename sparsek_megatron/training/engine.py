# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed around the model: parameter groups, the optimizer that the machine has, and the ZeRO configuration."""

import contextlib
import copy
import importlib.util
import logging
import math
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch

from sparsek_megatron.errors import UserError
from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.ds_config import build_ds_config
from sparsek_megatron.training.model import uses_bf16
from sparsek_megatron.training.optimizer_state import keep_own_settings
from sparsek_megatron.training.parallel import DeepSpeedMpu, Machine
from sparsek_megatron.training.zero_accumulation import forget_skipped_sums, zero_1_in_fp32
from sparsek_megatron.training.zero_backward import wait_by_stream
from sparsek_megatron.training.zero_step import norm_of_step, use_one_norm


def parameter_groups(config: TrainingConfig, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Optimizer groups: norms and position slopes have no weight decay, the scorer a learning-rate multiplier.

    Each group's `lr_mult` is what the schedule's learning rate is multiplied with at every step.
    """
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            kind = (parameter.dim() >= 2, getattr(parameter, "sparsek_scorer", False))
            groups.setdefault(kind, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr_mult": config.sparsek_lr_mult if is_scorer else 1.0,
        }
        for (decays, is_scorer), parameters in sorted(groups.items())
    ]


def build_optimizer(config: TrainingConfig, groups: list[dict[str, Any]], machine: Machine) -> tuple[Any, str]:
    """(AdamW, its name): on a GPU NVIDIA Apex's fused one where Apex is installed with its CUDA extensions. Without it
    torch's fused one in bf16 with ZeRO 1 and 2, where it skips a step without a wait of the host (`zero_step`), and
    otherwise DeepSpeed's where it can be built, else torch's. On CPU torch's. With --offload-optimizer DeepSpeed's CPU
    one, which it compiles.

    Raises:
        UserError: --offload-optimizer without a C++ compiler.
    """
    betas = (config.adam_beta1, config.adam_beta2)
    common: dict[str, Any] = {"lr": config.lr, "betas": betas, "eps": config.adam_eps, "weight_decay": 0.0}
    if config.offload_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        try:
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **common), "DeepSpeed CPUAdam"
        except Exception as err:  # DeepSpeed's builder raises several kinds
            reason = str(err).splitlines()[0]
            raise UserError(f"--offload-optimizer: DeepSpeedCPUAdam does not build here ({reason}); needs g++") from err
    if not machine.on_gpu:
        return torch.optim.AdamW(groups, **common), "torch AdamW"
    if importlib.util.find_spec("apex") and importlib.util.find_spec("apex.optimizers"):
        from apex.optimizers import FusedAdam as ApexFusedAdam  # pyright: ignore[reportMissingImports]

        try:
            return ApexFusedAdam(groups, adam_w_mode=True, **common), "Apex FusedAdam"
        except (RuntimeError, ImportError) as err:  # an Apex without its CUDA extensions imports all the same
            _tell(machine, "Apex FusedAdam does not run here", err, "using the next")
    skips_on_device = config.zero_stage in (1, 2) and uses_bf16(config, on_gpu=True)
    if not skips_on_device and shutil.which("nvcc") and shutil.which("ninja"):
        from deepspeed.ops.adam import FusedAdam

        try:
            return FusedAdam(groups, adam_w_mode=True, **common), "DeepSpeed FusedAdam"
        except Exception as err:  # DeepSpeed's builder raises several kinds where no compiler fits this CUDA
            architectures = os.environ.get("TORCH_CUDA_ARCH_LIST")  # DeepSpeed reads no 9.0a there
            where = f"with TORCH_CUDA_ARCH_LIST={architectures}" if architectures else "here"
            _tell(machine, f"DeepSpeed FusedAdam does not build {where}", err, "using torch's")
    return torch.optim.AdamW(groups, fused=True, **common), "torch fused AdamW"


def _tell(machine: Machine, what: str, err: Exception, instead: str) -> None:
    if machine.is_first:
        reason = next(iter(str(err).splitlines()), type(err).__name__)
        print(f"{what} ({reason}); {instead}", flush=True)


def deepspeed_config(config: TrainingConfig, machine: Machine) -> dict[str, Any]:
    """DeepSpeed's configuration for this run; raises `UserError` where the user's file contradicts it."""
    return build_ds_config(
        config,
        data_parallel=config.data_parallel_size(machine.world_size),
        bf16=uses_bf16(config, on_gpu=machine.on_gpu),
        overlap=machine.on_gpu,
    )


def build_engine(config: TrainingConfig, model: torch.nn.Module, machine: Machine) -> tuple[Any, str]:
    """(DeepSpeed engine, name of the optimizer). The process group must exist.

    Raises:
        UserError: DeepSpeed does not take a setting of the user's file.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.logger.setLevel(logging.ERROR)
    if not machine.on_gpu:
        # Used by DeepSpeed's inference all-reduce alone; building it would take a C++ compiler and half a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings = deepspeed_config(config, machine)
    # Without its view of the process group DeepSpeed takes a configuration for that of one rank.
    backend = get_accelerator().communication_backend_name()  # pyright: ignore[reportOptionalMemberAccess]
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False)
    if config.deepspeed_config:
        require_readable(config.deepspeed_config, settings)
    optimizer, name = build_optimizer(config, parameter_groups(config, model), machine)
    keep_own_settings(optimizer)
    with zero_1_in_fp32(), _without_steps(optimizer):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=settings,
            mpu=DeepSpeedMpu(),
            dist_init_required=False,
        )
    forget_skipped_sums(engine)
    use_one_norm(engine)
    wait_by_stream(engine)
    if _steps_without_norm(engine):
        engine.clip_fp32_gradients = lambda: None  # `take_step` does
    return engine, name


@contextlib.contextmanager
def _without_steps(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """DeepSpeed's optimizer for bf16 without ZeRO takes a step on zero gradients as it is made: Adam's count would
    begin at 1, and the weights would decay once.
    """
    optimizer.step = lambda *_, **__: None  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del optimizer.step  # the class's own again


def require_readable(path: str, settings: dict[str, Any]) -> None:
    """Raise `UserError` where DeepSpeed does not understand a setting of the file at `path`."""
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(copy.deepcopy(settings), DeepSpeedMpu())
    except Exception as err:  # it raises several kinds, assertions and pydantic's among them
        if hasattr(err, "errors"):  # pydantic's
            first = err.errors()[0]  # pyright: ignore[reportAttributeAccessIssue]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        else:
            reason = next(iter(str(err).splitlines()), "") or type(err).__name__
        raise UserError(f"--deepspeed-config {path}: DeepSpeed does not take it ({reason}); mend the file") from err


def _steps_without_norm(engine: Any) -> bool:
    """Whether DeepSpeed's step neither keeps the gradients' norm nor looks at it: without ZeRO, in float32."""
    return not engine.zero_optimization() and not engine.bfloat16_enabled()


def set_learning_rate(engine: Any, value: float) -> None:
    """Set this step's learning rate in every group, times the group's multiplier."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value * group["lr_mult"]


def take_step(engine: Any) -> float | None:
    """The engine's step after one micro-batch; at the end of the batch, the gradient norm before clipping, else None.

    A norm that is not finite leaves weights and optimizer state as they are, on every rank. ZeRO sees to that itself
    and then reports infinity. Without ZeRO in float32 the norm is taken and the gradients are clipped here: where it is
    not finite they are dropped, and an optimizer without gradients does nothing.
    """
    at_boundary = engine.is_gradient_accumulation_boundary()
    norm = None
    if at_boundary and _steps_without_norm(engine):
        from deepspeed.runtime.utils import clip_grad_norm_

        parameters = list(engine.module.parameters())
        norm = float(clip_grad_norm_(parameters, max_norm=engine.gradient_clipping() or math.inf, mpu=engine.mpu))
        if not math.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None
    engine.step()
    if not at_boundary:
        return None
    return norm_of_step(engine) if norm is None else norm
