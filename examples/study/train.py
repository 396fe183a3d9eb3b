# SPDX-License-Identifier: Apache-2.0
"""One run: train one arm with one seed, evaluate it, and write everything to one JSON-lines log."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from arms import Arm, Table
from data import Batch, make
from megatron.core.models.gpt import GPTModel
from model import build, start_megatron

from sparsek_megatron.optimizer import SCORER_ATTRIBUTE

BUCKETS = 32


@dataclass(frozen=True)
class Run:
    """One arm, one seed. deadline: time.time() after which training stops early, which the log says."""

    table: str
    arm: Arm
    seed: int
    settings: Table
    folder: Path
    inputs: tuple[str, ...] = ()
    include: str = "*"
    deadline: float = math.inf

    @property
    def log(self) -> Path:
        return log_path(self.folder, self.arm.name, self.seed)

    @property
    def weights(self) -> Path:
        return self.log.with_suffix(".pt")


def log_path(folder: Path, arm: str, seed: int) -> Path:
    """Log of one arm and seed."""
    name = "".join(c if c.isalnum() or c in "_-" else "_" for c in arm)
    return folder / f"{name}-seed{seed}.jsonl"


class Optimizer:
    """AdamW with fp32 master weights; scorers at their own rate; slope and norms without weight decay."""

    def __init__(self, model: GPTModel, learning_rate: float, scorer_lr_mult: float) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters = [torch.nn.Parameter(p.detach().float().clone()) for p in self.parameters]
        groups: dict[tuple[bool, bool], list[Any]] = {}
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            key = (hasattr(parameter, SCORER_ATTRIBUTE), parameter.dim() > 1)
            groups.setdefault(key, []).append(master)
        self.rates = {key: learning_rate * (scorer_lr_mult if key[0] else 1.0) for key in groups}
        self.keys = list(groups)
        self.adam = torch.optim.AdamW(
            [{"params": group, "weight_decay": 0.1 if key[1] else 0.0} for key, group in groups.items()],
            betas=(0.9, 0.95),
            fused=self.masters[0].is_cuda,
        )

    def step(self, factor: float) -> None:
        """Clip to norm 1, update, and copy back; parameters without a gradient stay."""
        used = []
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
            if master.grad is not None:
                used.append((parameter, master))
        torch.nn.utils.clip_grad_norm_([master for _, master in used], 1.0)
        for group, key in zip(self.adam.param_groups, self.keys, strict=True):
            group["lr"] = factor * self.rates[key]
        self.adam.step()
        with torch.no_grad():
            for parameter, master in used:
                parameter.copy_(master)


def rate_factor(step: int, steps: int) -> float:
    """Warm-up over a tenth of the steps, then a cosine to a tenth."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def token_losses(model: GPTModel, batch: Batch, device: torch.device) -> torch.Tensor:
    """Losses [b, n] fp32 in nats."""
    inputs, labels = batch.inputs.to(device), batch.labels.to(device)
    positions = torch.arange(inputs.shape[1], device=device).expand_as(inputs)
    return model(inputs, positions, None, labels=labels).float()


@torch.no_grad()
def evaluate(model: GPTModel, batches: Iterable[Batch], device: torch.device, far: int) -> dict[str, Any]:
    """Mean loss, loss beyond position `far`, loss by position; for recall tasks accuracy, also by distance."""
    model.eval()
    torch.manual_seed(0)
    total = count = None
    right: list[tuple[float, bool]] = []
    for batch in batches:
        weights = batch.weights.to(device)
        if batch.distance is None:
            losses = token_losses(model, batch, device)
        else:
            inputs, labels = batch.inputs.to(device), batch.labels.to(device)
            positions = torch.arange(inputs.shape[1], device=device).expand_as(inputs)
            logits = model(inputs, positions, None).float()
            losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            asked = weights > 0
            hit = (logits.argmax(-1) == labels)[asked].tolist()
            right += zip(batch.distance.to(device)[asked].tolist(), hit, strict=True)
        sums, parts = (losses * weights).double().sum(0), weights.double().sum(0)
        total = sums if total is None else total + sums
        count = parts if count is None else count + parts
    model.train()
    assert total is not None and count is not None
    length = total.shape[0]
    edges = [round(i * length / BUCKETS) for i in range(BUCKETS + 1)]
    spans = [(a, b) for a, b in pairwise(edges) if float(count[a:b].sum()) > 0]
    answer: dict[str, Any] = {
        "length": length,
        "loss": float(total.sum() / count.sum()),
        "loss_by_position": [(a, float(total[a:b].sum() / count[a:b].sum())) for a, b in spans],
    }
    if float(count[far:].sum()) > 0:
        answer["loss_far"] = float(total[far:].sum() / count[far:].sum())
    if right:
        answer["accuracy"] = sum(hit for _, hit in right) / len(right)
        answer["accuracy_by_distance"] = _by_distance(right, length)
    return answer


def _by_distance(right: list[tuple[float, bool]], length: int) -> list[tuple[int, float, int]]:
    """(start of the distance bucket, accuracy, questions) for eighths of the length."""
    found = []
    for bucket in range(8):
        low, high = bucket * length / 8, (bucket + 1) * length / 8
        hits = [hit for distance, hit in right if low <= distance < high]
        if hits:
            found.append((int(low), sum(hits) / len(hits), len(hits)))
    return found


def train(run: Run) -> Path:
    """Train and evaluate; returns the log. Lines: the settings, losses every tenth of the steps, the evaluations."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.log, "w") as stream:
        _train(run, stream)
    return run.log


def _write(stream: TextIO, kind: str, **values: Any) -> None:
    stream.write(json.dumps({"kind": kind, **values}) + "\n")
    stream.flush()


def _train(run: Run, stream: TextIO) -> None:
    table, arm = run.settings, run.arm
    device = start_megatron(run.seed)
    data = make(table.data, list(run.inputs), run.folder.parent / "data", run.include)
    model = build(arm, table, data.vocabulary, device)
    if arm.start is not None:
        started = torch.load(
            log_path(run.folder, arm.start, run.seed).with_suffix(".pt"), map_location=device
        )
        model.load_state_dict(started)
    model.train()
    steps = max(1, round(table.steps * arm.part_of_steps))
    size = max(1, table.tokens_per_step // table.length)
    _write(
        stream,
        "settings",
        table=run.table,
        arm=dataclasses.asdict(arm),
        seed=run.seed,
        steps=steps,
        batch=size,
        model=dataclasses.asdict(table.model),
        length=table.length,
        learning_rate=table.learning_rate,
        parameters=sum(p.numel() for p in model.parameters()),
        device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        torch=torch.__version__,
        corpus=getattr(data, "corpus", type(data).__name__),
    )
    optimizer = Optimizer(model, table.learning_rate, arm.sparsek.scorer_lr_mult)
    taken, began = 0, time.time()
    while taken < steps and time.time() < run.deadline:
        batch = data.batch(run.seed, taken, size, table.length)
        losses, weights = token_losses(model, batch, device), batch.weights.to(device)
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        optimizer.step(rate_factor(taken, steps))
        taken += 1
        if taken % max(1, steps // 10) == 0 or taken == steps:
            value = float(loss.detach())
            _write(stream, "train", step=taken, loss=value, seconds=time.time() - began)
            if not math.isfinite(value):
                raise RuntimeError(f"{arm.name}, seed {run.seed}: the loss is {value} at step {taken}")
    seconds = time.time() - began
    for length in table.eval_lengths or (table.length,):
        result = evaluate(model, data.evaluation(length, table.evaluation_tokens), device, table.far)
        _write(stream, "evaluation", steps=taken, of=steps, seconds=seconds, **result)
    if any(other.start == arm.name for other in table.arms):
        torch.save(model.state_dict(), run.weights)
