# SPDX-License-Identifier: Apache-2.0
"""One run: train one arm with one seed, evaluate it, and write everything to one JSON-lines log."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from arms import Arm, Table
from data import Batch, Corpus, make
from megatron.core.models.gpt import GPTModel
from model import build, start_megatron
from pace import CHUNK, Pace
from steps import Optimizer, Stepper, logits_of, rate_factor, token_losses

BUCKETS = 32


@dataclass(frozen=True)
class Run:
    """One arm, one seed."""

    table: str
    arm: Arm
    seed: int
    settings: Table
    folder: Path
    corpus: Corpus = field(default_factory=Corpus)
    save: bool = False
    eager: bool = False

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


@torch.no_grad()
def evaluate(model: GPTModel, batches: Iterable[Batch], device: torch.device, far: int) -> dict[str, Any]:
    """Mean loss, loss beyond position `far`, loss by position; for recall tasks accuracy, also by distance."""
    model.eval()
    torch.manual_seed(0)
    total = count = None
    right: list[tuple[float, bool]] = []
    for batch in batches:
        tokens, weights = batch.tokens.to(device), batch.weights.to(device)
        if batch.distance is None:
            losses = token_losses(model, tokens)
        else:
            logits, labels = logits_of(model, tokens[:, :-1]).float(), tokens[:, 1:]
            losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            asked = weights > 0
            hit = (logits.argmax(-1) == labels)[asked].tolist()
            right += zip(batch.distance.to(device)[asked].tolist(), hit, strict=True)
        sums, parts = (losses * weights).double().sum(0), weights.double().sum(0)
        total = sums if total is None else total + sums
        count = parts if count is None else count + parts
    model.train()
    assert total is not None and count is not None
    total, count = total.cpu(), count.cpu()
    length = total.shape[0]
    edges = [round(i * length / BUCKETS) for i in range(BUCKETS + 1)]
    spans = [(a, b) for a, b in pairwise(edges) if float(count[a:b].sum()) > 0]
    answer: dict[str, Any] = {
        "length": length,
        "loss": float(total.sum() / count.sum()),
        "loss_by_position": [(a, float(total[a:b].sum() / count[a:b].sum())) for a, b in spans],
    }
    if right:
        answer["accuracy"] = sum(hit for _, hit in right) / len(right)
        answer["accuracy_far"] = _share([hit for distance, hit in right if distance >= far])
        answer["accuracy_by_distance"] = _by_distance(right, length)
    elif float(count[far:].sum()) > 0:
        answer["loss_far"] = float(total[far:].sum() / count[far:].sum())
    return answer


def _share(hits: list[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


def _by_distance(right: list[tuple[float, bool]], length: int) -> list[tuple[int, float | None, int]]:
    """(start of the distance bucket, accuracy, questions) for distances from a power of two to the next."""
    found, low = [], 4
    while low < length:
        hits = [hit for distance, hit in right if low <= distance < 2 * low]
        if hits:
            found.append((low, _share(hits), len(hits)))
        low *= 2
    return found


def train(run: Run, pace: Pace | None = None) -> Path:
    """Train and evaluate; returns the log. Lines: the settings, losses of every chunk of steps, the evaluations.

    With a pace the run trains until its time is spent, else for the table's steps.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.log, "w") as stream:
        try:
            _train(run, pace, stream)
        finally:
            if pace is not None:
                pace.leave()
    return run.log


def _start_from(model: GPTModel, weights: Path, device: torch.device) -> None:
    """Load trained weights, all but the scorers, which are the arm's own kind and start at their own values."""
    saved, own = torch.load(weights, map_location=device, weights_only=True), model.state_dict()
    scorers = {name: value for name, value in own.items() if _of_a_scorer(name)}
    model.load_state_dict({name: value for name, value in saved.items() if not _of_a_scorer(name)} | scorers)


def _of_a_scorer(name: str) -> bool:
    return ".scorer." in name or name.endswith(".score_weight")


def batch_shape(arm: Arm, table: Table) -> tuple[int, int]:
    """(sequences, tokens of each) of the arm's training batches."""
    length = arm.length or table.length
    return max(1, table.tokens_per_step // length), length


def stepper_for(model: GPTModel, arm: Arm, table: Table, *, eager: bool = False) -> Stepper:
    """The arm's training steps."""
    model.train()
    optimizer = Optimizer(model, table.learning_rate * arm.rate, arm.sparsek.scorer_lr_mult)
    return Stepper(model, optimizer, *batch_shape(arm, table), eager=eager)


def _write(stream: TextIO, kind: str, **values: Any) -> None:
    stream.write(json.dumps({"kind": kind, **values}) + "\n")
    stream.flush()


def _train(run: Run, pace: Pace | None, stream: TextIO) -> None:
    table, arm = run.settings, run.arm
    device = start_megatron(run.seed)
    data = make(table.data, run.corpus, run.folder.parent / "data")
    model = build(arm, table, data.vocabulary, device)
    if arm.start is not None:
        _start_from(model, log_path(run.folder, arm.start, run.seed).with_suffix(".pt"), device)
    steps = max(1, round(table.steps * arm.part_of_steps))
    size, length = batch_shape(arm, table)
    _write(
        stream,
        "settings",
        table=run.table,
        arm=dataclasses.asdict(arm),
        seed=run.seed,
        steps=steps if pace is None else None,
        batch=size,
        model=dataclasses.asdict(table.model),
        length=length,
        learning_rate=table.learning_rate * arm.rate,
        parameters=sum(p.numel() for p in model.parameters()),
        device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        torch=torch.__version__,
        corpus=getattr(data, "corpus", type(data).__name__),
    )
    stepper = stepper_for(model, arm, table, eager=run.eager)
    began, reached, a_step = time.time(), 0.0, 0.0 if pace is not None else 1 / steps
    while stepper.taken < steps if pace is None else reached < 1:
        chunk = CHUNK if pace is not None else min(CHUNK, steps - stepper.taken)
        for i in range(chunk):
            batch = data.batch(run.seed, stepper.taken, size, length)
            stepper.step(batch, rate_factor(stepper.taken, reached + i * a_step))
        loss = stepper.mean_loss()
        _write(stream, "train", step=stepper.taken, loss=loss, progress=reached, seconds=time.time() - began)
        reached, a_step = (stepper.taken / steps, a_step) if pace is None else pace.wait()
    seconds, taken = time.time() - began, stepper.taken
    layers: Any = model.decoder.layers
    slopes = [layer.self_attention.scorer.slope for layer in layers]
    _write(stream, "slopes", layers=[None if slope is None else slope.tolist() for slope in slopes])
    del stepper  # and with it the optimizer and the graph's memory
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    lengths = (length,) if arm.length else table.eval_lengths or (length,)
    for length in lengths:
        result = evaluate(model, data.evaluation(length, table.evaluation_tokens), device, table.far)
        _write(stream, "evaluation", steps=taken, seconds=seconds, **result)
    if run.save or any(other.start == arm.name for other in table.arms):
        torch.save(model.state_dict(), run.weights)
