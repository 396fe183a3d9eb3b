# SPDX-License-Identifier: Apache-2.0
"""What a run tells: a live progress bar or lines, TensorBoard scalars, `metrics.jsonl` and the loss curve."""

import dataclasses
import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sparsek_megatron.files import atomic_write
from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.health import SelectionHealth

METRICS = "metrics.jsonl"
HEALTH = "health"
CURVE = "loss_curve.png"


def read_metrics(folder: str | Path, *, health: bool = False) -> list[dict[str, Any]]:
    """Records of `metrics.jsonl`, a torn last line (the run was killed while writing it) left out.

    They hold what a run that is repeated repeats to the last bit; with `health` also what depends on the machine.
    """
    path = Path(folder) / METRICS
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                break
            records.append(record if health else {name: each for name, each in record.items() if name != HEALTH})
    return records


class Report:
    """The reporting of one run; made on the first rank only.

    A record of `metrics.jsonl` is `{"step", "loss", "lr", "grad_norm", "health"}`, or `{"step", "valid_loss"}`; `step`
    counts optimizer steps taken, skipped ones too. Numbers that are not finite are null. Losses are in nats per
    token. "health" is `{"tokens_per_second", "seconds", "mfu", "memory_gib"}` and, where the selection was looked at,
    what `SelectionHealth` says of it. TensorBoard has the same numbers of every step. In the record alone, "health" of
    the first step after a checkpoint was begun has "checkpoint_waited", the seconds of `save()`, which the step's own
    "seconds" leave out; and that of a process's first step has `"started": true`.

    tokens_per_step: of all ranks. flops_per_token: see `flops`. peak_flops: of all GPUs per second, None where unknown:
    there is no MFU then.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        start: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float | None,
        entropy: float,
    ):
        from torch.utils.tensorboard import SummaryWriter

        self._config = config
        self._entropy = entropy
        self._tokens_per_step = tokens_per_step
        self._peak_tokens = peak_flops / flops_per_token if peak_flops else None  # per second, at MFU 1
        folder = Path(config.save)
        # A killed run may have logged steps past its last checkpoint: they will be taken again.
        # From the start that is all, its validation too.
        kept = [each for each in read_metrics(folder, health=True) if start and each["step"] <= start]
        with atomic_write(folder / METRICS) as stream:
            stream.writelines(json.dumps(each) + "\n" for each in kept)
        self._stream = open(folder / METRICS, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - see close()
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else 0)
        self._live = sys.stderr.isatty()
        self._bar = tqdm(
            total=config.train_iters, initial=start, unit="step", desc="training", dynamic_ncols=True,
            disable=not self._live, smoothing=0.1, file=sys.stderr,
        )  # fmt: skip
        self._valid = ""
        self._speed = 0.0
        self._waited: float | None = None  # for the checkpoint that the next step is the first one after
        self._start, self._last, self._begun = start, time.perf_counter(), time.perf_counter()

    def step(
        self, *, step: int, loss: float, lr: float, grad_norm: float, selection: SelectionHealth | None
    ) -> None:
        """After optimizer step number `step` (1 is the first); `selection` where it was looked at."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        speed = self._tokens_per_step / seconds
        self._speed = speed if not self._speed else 0.9 * self._speed + 0.1 * speed
        health = {"tokens_per_second": speed, "seconds": seconds, "memory_gib": _peak_memory_gib()}
        if self._peak_tokens:
            health["mfu"] = speed / self._peak_tokens
        looked = {k: v for k, v in dataclasses.asdict(selection).items() if v is not None} if selection else {}
        trained = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
        finite = {name: _finite(value) for name, value in trained.items()}
        events = {} if self._waited is None else {"checkpoint_waited": self._waited}
        started = {"started": True} if step == self._start + 1 else {}
        self._waited = None
        seen = {name: _finite(value) for name, value in looked.items()}
        self._write({"step": step, **finite, HEALTH: health | seen | events | started})
        for name, value in (trained | health).items():
            self._board.add_scalar(f"train/{name}", value, step)
        for name, value in looked.items():
            self._board.add_scalar(f"selection/{name}", value, step)
        self._bar.set_postfix_str(f"loss {loss:.3f}, {self._speed:,.0f} tokens/s{self._valid}", refresh=False)
        self._bar.update(1)
        if step % self._config.log_interval == 0 or step == self._config.train_iters:
            left = (self._config.train_iters - step) * (now - self._begun) / (step - self._start)
            mfu = f"  MFU {self._speed / self._peak_tokens:.1%}" if self._peak_tokens else ""
            self.line(
                f"step {step}/{self._config.train_iters}  loss {loss:.4f}  lr {lr:.2e}  grad norm {grad_norm:.3f}  "
                f"{self._speed:,.0f} tokens/s{mfu}  {health['memory_gib']:.2f} GiB  {_in_words(selection)}"
                f"ETA {int(left) // 60}:{int(left) % 60:02d}"
            )

    def checkpoint(self, *, step: int, waited: float) -> None:
        """A checkpoint of `step` has begun; training waited so many seconds, which tokens/s leaves out."""
        self._waited = waited
        self._board.add_scalar("checkpoint/seconds_waited", waited, step)
        self.line(f"step {step}: checkpoint begun, training waited {waited:.3f} s")
        self.restart_clock()

    def validation(self, *, step: int, loss: float) -> None:
        """After a validation at `step`."""
        self._write({"step": step, "valid_loss": _finite(loss)})
        self._board.add_scalar("valid/loss", loss, step)
        self._board.add_scalar("valid/unigram_entropy", self._entropy, step)
        self._valid = f", valid {loss:.3f}"
        self.line(
            f"step {step}: validation loss {loss:.4f} nats, unigram entropy {self._entropy:.4f} "
            f"({abs(self._entropy - loss):.4f} {'below' if loss < self._entropy else 'above'} it)"
        )
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave the time since the last step out of tokens/s."""
        self._last = time.perf_counter()

    def line(self, text: str) -> None:
        """A line that does not tear the progress bar."""
        self._bar.write(text, file=sys.stdout) if self._live else print(text, flush=True)

    def _write(self, record: dict[str, Any]) -> None:
        self._stream.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Flush everything and draw the curve."""
        self._bar.close()
        self._stream.close()
        self._board.close()
        draw_curve(Path(self._config.save), self._entropy)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _peak_memory_gib() -> float:
    """Most memory that this process has held: allocated on the GPU, or resident where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _in_words(selection: SelectionHealth | None) -> str:
    if selection is None or selection.saturated is None:
        return ""
    overflow = "" if selection.overflow is None else f", {selection.overflow:.1%} pool overflow"
    return f"gates {selection.saturated:.0%} saturated, age {selection.mean_age:,.0f}{overflow}  "


def draw_curve(folder: Path, entropy: float) -> None:
    """`loss_curve.png`: training and validation loss against steps, with the unigram entropy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(folder)
    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    valid = [(r["step"], r["valid_loss"]) for r in records if r.get("valid_loss") is not None]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*train, strict=True), label="training loss", linewidth=1) if train else None
    axes.plot(*zip(*valid, strict=True), "o-", label="validation loss") if valid else None
    axes.axhline(entropy, linestyle="--", color="gray", label=f"unigram entropy {entropy:.2f}")
    axes.set(xlabel="step", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(folder / CURVE, "wb") as stream:
        figure.savefig(stream, format="png", dpi=120)
