# SPDX-License-Identifier: Apache-2.0
"""The engine's steps on gradients that are known: prints what each case of `test_zero_accumulation` measured.

`accumulation_worker.py LAUNCHES`, a JSON list of [ranks, {name: case}]: on CPU one after another, on as many forked
ranks each; started by torchrun, the cases of the launch of as many ranks, on GPUs.
"""

import dataclasses
import hashlib
import json
import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor
from torch.profiler import record_function

from sparsek_megatron.errors import write_whole_lines
from sparsek_megatron.training import engine as engine_module
from sparsek_megatron.training import parallel, zero_backward
from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.engine import build_engine, set_learning_rate, take_step

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS), str(TESTS / "plugin"), str(TESTS.parent / "examples")]

from forked_ranks import run_ranks  # noqa: E402
from gloo_device import share_gloo_device  # noqa: E402
from training_benchmark.trace import profile_step  # noqa: E402

# With a bucket of 512 elements the second does not fit into one, and two ranks share the third.
SHAPES = ((7,), (40, 30), (16, 16), (3,), (5, 9))
BUCKET = 512
# Where streams are compared: reductions that take their time.
LARGE = ((512,), *[(1024, 1024)] * 6, (3000, 1024), *[(1024, 512)] * 6)
LARGE_BUCKET = 2_000_000
BETA = 0.9


Shapes = tuple[tuple[int, ...], ...]


class Linear(torch.nn.Module):
    """A loss whose gradient is what it is called with."""

    def __init__(self, device: torch.device, shapes: Shapes):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weights = torch.nn.ParameterList(
            torch.randn(shape, generator=generator).bfloat16().to(device) for shape in shapes
        )

    def forward(self, gradients: list[Tensor]) -> Tensor:
        return torch.stack([(w.float() * g).sum() for w, g in zip(self.weights, gradients, strict=True)]).sum()


def gradients(
    step: int, rank: int, micro_batch: int, shapes: Shapes = SHAPES, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """Values of bf16, the first micro-batch's above 1 and the others' so small that bf16 loses them one by one."""
    generator = torch.Generator(device).manual_seed(1000 * step + 100 * rank + micro_batch)
    signs = torch.Generator(device).manual_seed(step)
    found = []
    for shape in shapes:
        size = torch.rand(shape, generator=generator, device=device) + (1.0 if micro_batch == 0 else 0.0)
        sign = torch.randint(0, 2, shape, generator=signs, device=device) * 2 - 1
        found.append((size * sign * (1.0 if micro_batch == 0 else 2**-9)).bfloat16().float())
    return found


def wanted(
    step: int, ranks: int, micro_batches: int, shapes: Shapes = SHAPES, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """The mean over ranks and micro-batches, in float64."""
    total = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]
    for rank in range(ranks):
        for micro_batch in range(micro_batches):
            for each, gradient in zip(total, gradients(step, rank, micro_batch, shapes, device), strict=True):
                each += gradient.double() / (ranks * micro_batches)
    return total


def norm_of(tensors: list[Tensor]) -> float:
    return float(torch.stack([x.square().sum() for x in tensors]).sum().sqrt())


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative one of an element."""
    pairs = zip(found, expected, strict=True)
    return max(float(((f.double().cpu().view_as(e) - e) / e).abs().max()) for f, e in pairs)


def fused_adamw(config: TrainingConfig, groups: list[dict[str, Any]], machine: parallel.Machine) -> tuple[Any, str]:
    """In the place of `build_optimizer`: a GPU's choice, on CPU."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.adam_beta1, 0.95), fused=True), "torch fused AdamW"


def build(
    machine: parallel.Machine, config: TrainingConfig, settings: dict[str, Any], shapes: Shapes = SHAPES
) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ds.json")
        path.write_text(json.dumps({"zero_optimization": settings}))
        config = dataclasses.replace(config, deepspeed_config=str(path))
        engine, _ = build_engine(config, Linear(machine.device, shapes), machine)
    return engine


def take(
    engine: Any, machine: parallel.Machine, step: int, micro_batches: int, *, nan: bool = False,
    shapes: Shapes = SHAPES,
) -> float:  # fmt: skip
    """Takes optimizer step `step`; its gradient norm. With `nan` the last rank has a NaN on the way."""
    norm = None
    for micro_batch in range(micro_batches):
        where = machine.device if shapes is LARGE else "cpu"  # where float64 is compared: the CPU's numbers
        given = [g.to(machine.device) for g in gradients(step, machine.rank, micro_batch, shapes, where)]
        if nan and machine.rank == machine.world_size - 1 and micro_batch == micro_batches // 2:
            given[1][3, 3] = float("nan")
        loss = engine(given)
        with record_function("phase:backward"):
            engine.backward(loss)
        norm = take_step(engine)
    assert norm is not None
    return norm


def accumulate(
    machine: parallel.Machine, *, zero_stage: int, micro_batches: int, clip_grad: float = 0.0, offload: bool = False,
    settings: dict[str, Any] | None = None, fused: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Three steps, the second with a NaN: relative differences from float64 of what the optimizer was given. With
    `fused`, by the optimizer of a GPU, torch's fused AdamW.
    """
    ranks = machine.world_size
    config = TrainingConfig(
        lr=0.0, micro_batch_size=1, global_batch_size=ranks * micro_batches, zero_stage=zero_stage, bf16=True,
        clip_grad=clip_grad, offload_optimizer=offload, weight_decay=0.0, adam_beta1=BETA, seq_length=64,
    )  # fmt: skip
    sizes = {"stage3_param_persistence_threshold": 0} if zero_stage == 3 else {}
    with patch.object(engine_module, "build_optimizer", fused_adamw) if fused else nullcontext():
        engine = build(machine, config, {"reduce_bucket_size": BUCKET, **sizes, **(settings or {})})
    parameters = list(engine.module.parameters())

    def moments() -> list[Tensor]:
        if zero_stage < 3:  # DeepSpeed looks for them once the first group has stepped, before the second one has any
            engine.optimizer._hp_optimizer_states_linked = False
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        return [safe_get_full_optimizer_state(p, "exp_avg").clone() for p in parameters]

    before = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    result: dict[str, Any] = {"optimizer": type(engine.optimizer).__name__, "gradient": [], "norm": []}
    for step in (1, 3):
        norm = take(engine, machine, step, micro_batches)
        mean = wanted(step, ranks, micro_batches)
        true_norm = norm_of(mean)
        scale = min(1.0, clip_grad / true_norm) if clip_grad else 1.0
        found = moments()
        given = [(f.double().cpu().view_as(b) - BETA * b) / (1 - BETA) for f, b in zip(found, before, strict=True)]
        result["norm"].append(abs(norm / true_norm - 1))
        result["gradient"].append(difference(given, [m * scale for m in mean]))
        before = [f.double().cpu() for f in found]
        if step == 1:
            weights = [safe_get_full_fp32_param(p).clone() for p in parameters]
            result["nan_norm"] = take(engine, machine, 2, micro_batches, nan=True)
            kept = zip(found + weights, moments() + [safe_get_full_fp32_param(p) for p in parameters], strict=True)
            result["nan_changes_nothing"] = all(torch.equal(a, b) for a, b in kept)
    optimizer = engine.optimizer.optimizer
    result["on_device"] = hasattr(optimizer, "found_inf")
    result["skipped"] = engine.skipped_steps
    result["steps"] = sorted({float(state["step"]) for state in optimizer.state.values()})
    return result


def first_step(machine: parallel.Machine, *, zero_stage: int) -> dict[str, Any]:
    """Adam's step counts before and after one step, and whether fp32 weights were the model's before it."""
    config = TrainingConfig(
        lr=0.01, micro_batch_size=1, global_batch_size=machine.world_size, zero_stage=zero_stage, bf16=True,
        clip_grad=0.0, weight_decay=0.5, seq_length=64,
    )  # fmt: skip
    engine = build(machine, config, {"reduce_bucket_size": BUCKET})
    optimizer = engine.optimizer.optimizer

    def counts() -> list[float]:
        return sorted({float(state["step"]) for state in optimizer.state.values() if "step" in state})

    def values(tensors: Any) -> Tensor:
        flat = torch.cat([x.detach().float().flatten() for x in tensors])
        return flat[flat != 0].sort().values  # ZeRO pads with zeros

    weights = values(weight for group in optimizer.param_groups for weight in group["params"])
    result = {"before": counts(), "kept": torch.equal(weights, values(engine.module.parameters()))}
    set_learning_rate(engine, config.lr)
    take(engine, machine, 1, 1)
    return result | {"after": counts()}


def waits_in_backward(engine: Any, machine: parallel.Machine, step: int, micro_batches: int) -> tuple[float, int]:
    """Takes optimizer step `step`; its norm, and how often the host waits for the GPU within its backward passes."""
    norms: list[float] = []
    split = profile_step(
        lambda: norms.append(take(engine, machine, step, micro_batches, shapes=LARGE)), engine.module
    )
    assert split.waits  # for the norm at least, which `take_step` reads
    return norms[0], split.waits["backward"]


def end_of_backward(machine: parallel.Machine, *, zero_stage: int, micro_batches: int) -> dict[str, Any]:
    """Six steps with `wait_by_stream` and with DeepSpeed's own wait: the norms' relative differences from float64, the
    norms, a digest of the weights after five, waits in backward of the sixth.

    Both hold the memory of a gradient that fits into no bucket until it has been reduced. DeepSpeed by itself does not:
    with two ranks of H200, ZeRO-2 and three micro-batches its second norm was 8.6e15.
    """
    config = TrainingConfig(
        lr=1e-2, micro_batch_size=1, global_batch_size=machine.world_size * micro_batches, zero_stage=zero_stage,
        bf16=True, clip_grad=1.0, seq_length=64,
    )  # fmt: skip
    found = {}
    ends_as_known = zero_backward.ends_as_known
    true_norms = [
        norm_of(wanted(step, machine.world_size, micro_batches, LARGE, machine.device)) for step in range(1, 7)
    ]
    for name in ("by_stream", "by_host"):
        zero_backward.ends_as_known = ends_as_known if name == "by_stream" else lambda kind: False
        engine = build(machine, config, {"reduce_bucket_size": LARGE_BUCKET}, LARGE)
        set_learning_rate(engine, config.lr)
        norms = [take(engine, machine, step, micro_batches, shapes=LARGE) for step in range(1, 6)]
        digest = hashlib.sha256()
        for parameter in engine.module.parameters():
            digest.update(safe_get_full_fp32_param(parameter).cpu().numpy().tobytes())
        last, waits = waits_in_backward(engine, machine, 6, micro_batches)
        norms.append(last)
        off = [abs(norm / true_norm - 1) for norm, true_norm in zip(norms, true_norms, strict=True)]
        found[name] = {"off": off, "norms": norms, "weights": digest.hexdigest(), "waits": waits}
    zero_backward.ends_as_known = ends_as_known
    return found


def run(cases: dict[str, Any]) -> None:
    """This rank's part of `cases`; the first rank prints what they gave."""
    if not torch.cuda.is_available():
        share_gloo_device()
    write_whole_lines()
    machine = parallel.initialize(TrainingConfig(seq_length=64))
    measure = {"accumulate": accumulate, "end_of_backward": end_of_backward, "first_step": first_step}
    results = {name: measure[case.pop("by", "accumulate")](machine, **case) for name, case in cases.items()}
    if dist.get_rank() == 0:
        print("RESULTS " + json.dumps(results), flush=True)
    parallel.shutdown()


if __name__ == "__main__":
    launches = json.loads(sys.argv[1])
    if "RANK" in os.environ:
        for ranks, cases in launches:
            if ranks == int(os.environ["WORLD_SIZE"]):
                run(cases)
    else:
        for ranks, cases in launches:
            run_ranks(lambda cases=cases: run(cases), ranks)
