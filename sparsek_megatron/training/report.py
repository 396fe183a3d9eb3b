# SPDX-License-Identifier: Apache-2.0
"""What a run tells: a live progress bar or lines, TensorBoard scalars, `metrics.jsonl` and the loss curve."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sparsek_megatron.files import temporary_sibling
from sparsek_megatron.training.arguments import TrainingConfig

METRICS = "metrics.jsonl"
CURVE = "loss_curve.png"


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Records of `metrics.jsonl`, a torn last line (the run was killed while writing it) left out."""
    path = Path(folder) / METRICS
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


class Report:
    """The reporting of one run; made on the first rank only.

    A record of `metrics.jsonl` is `{"step", "loss", "lr", "grad_norm"}`, or `{"step", "valid_loss"}`; `step` counts
    optimizer steps taken. Losses are in nats per token.
    """

    def __init__(self, config: TrainingConfig, *, start: int, tokens_per_step: int, entropy: float):
        from torch.utils.tensorboard import SummaryWriter

        self._config = config
        self._entropy = entropy
        self._tokens_per_step = tokens_per_step
        folder = Path(config.save)
        # A killed run may have logged steps past its last checkpoint: they will be taken again.
        kept = [record for record in read_metrics(folder) if record["step"] <= start]
        self._path = folder / METRICS
        partial = temporary_sibling(self._path)
        partial.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        os.replace(partial, self._path)
        self._stream = open(self._path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - see close()
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._live = sys.stderr.isatty()
        self._bar = tqdm(
            total=config.train_iters, initial=start, unit="step", desc="training", dynamic_ncols=True,
            disable=not self._live, smoothing=0.1, file=sys.stderr,
        )  # fmt: skip
        self._valid = ""
        self._speed = 0.0
        self._start, self._last, self._begun = start, time.perf_counter(), time.perf_counter()

    def step(self, *, step: int, loss: float, lr: float, grad_norm: float) -> None:
        """After optimizer step number `step` (1 is the first)."""
        now = time.perf_counter()
        speed = self._tokens_per_step / (now - self._last)
        self._last = now
        self._speed = speed if not self._speed else 0.9 * self._speed + 0.1 * speed
        self._write({"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm})
        for name, value in (("loss", loss), ("lr", lr), ("grad_norm", grad_norm), ("tokens_per_second", speed)):
            self._board.add_scalar(f"train/{name}", value, step)
        self._bar.set_postfix_str(f"loss {loss:.3f}, {self._speed:,.0f} tokens/s{self._valid}", refresh=False)
        self._bar.update(1)
        if not self._live and (step % self._config.log_interval == 0 or step == self._config.train_iters):
            left = (self._config.train_iters - step) * (now - self._begun) / (step - self._start)
            print(
                f"step {step}/{self._config.train_iters}  loss {loss:.4f}  lr {lr:.2e}  grad norm {grad_norm:.3f}  "
                f"{self._speed:,.0f} tokens/s  ETA {int(left) // 60}:{int(left) % 60:02d}",
                flush=True,
            )

    def validation(self, *, step: int, loss: float) -> None:
        """After a validation at `step`."""
        self._write({"step": step, "valid_loss": loss})
        self._board.add_scalar("valid/loss", loss, step)
        self._board.add_scalar("valid/unigram_entropy", self._entropy, step)
        self._valid = f", valid {loss:.3f}"
        self.line(
            f"step {step}: validation loss {loss:.4f} nats, unigram entropy {self._entropy:.4f} "
            f"({abs(self._entropy - loss):.4f} {'below' if loss < self._entropy else 'above'} it)"
        )
        self._last = time.perf_counter()

    def line(self, text: str) -> None:
        """A line that does not tear the progress bar."""
        self._bar.write(text, file=sys.stdout) if self._live else print(text, flush=True)

    def resume_clock(self) -> None:
        """Leave what happened since the last step (a checkpoint) out of tokens/s."""
        self._last = time.perf_counter()

    def _write(self, record: dict[str, Any]) -> None:
        self._stream.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Flush everything and draw the curve."""
        self._bar.close()
        self._stream.close()
        self._board.close()
        draw_curve(Path(self._config.save), self._entropy)


def draw_curve(folder: Path, entropy: float) -> None:
    """`loss_curve.png`: training and validation loss against steps, with the unigram entropy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(folder)
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    valid = [(r["step"], r["valid_loss"]) for r in records if "valid_loss" in r]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*train, strict=True), label="training loss", linewidth=1) if train else None
    axes.plot(*zip(*valid, strict=True), "o-", label="validation loss") if valid else None
    axes.axhline(entropy, linestyle="--", color="gray", label=f"unigram entropy {entropy:.2f}")
    axes.set(xlabel="step", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / CURVE
    partial = temporary_sibling(path)
    figure.savefig(partial, format="png", dpi=120)
    os.replace(partial, path)
