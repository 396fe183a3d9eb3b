# SPDX-License-Identifier: Apache-2.0
"""A run as programs read it that do not train: its newest checkpoint with whole weights, its settings and tokenizer."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.errors import UserError
from sparsek_megatron.training.arguments import FIELDS, TrainingConfig
from sparsek_megatron.training.launcher import is_launched, world_size_of_environment
from sparsek_megatron.training.run_folder import RUN, newest_complete, read_run, warn_passed_over

_STEP = "SPARSEK_CHOSEN_STEP"  # launched processes take the checkpoint that the launcher has checked and chosen

TENSOR_PARALLEL_HELP = (
    "processes that share each layer; default as many as in the run where there are GPUs for them, else 1"
)


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """`settings` are those of `TrainingConfig` that the run had, and what it derived from them."""

    folder: Path
    step: int
    settings: dict[str, Any]
    tokenizer: SentencePieceTokenizer

    @property
    def longest(self) -> int:
        """Positions of the model."""
        return self.settings["max_position_embeddings"] or self.settings["seq_length"]

    def choose_for_launched(self) -> None:
        """Let processes that are started from here on open this checkpoint."""
        os.environ[_STEP] = str(self.step)

    def tensor_parallel_size(self, asked: int | None) -> int:
        """The size to run with: the one asked for, else that of a launch, else the run's where there are GPUs for it,
        else 1.

        Raises:
            UserError: the run's heads, MLP width or vocabulary do not divide by it, or another number of processes was
                launched.
        """
        saved = self.settings["tensor_model_parallel_size"]
        launched = world_size_of_environment() if is_launched() else None
        size = launched if asked is None else asked
        if size is None:
            import torch

            size = saved if torch.cuda.device_count() >= saved else 1
        if size < 1:
            raise UserError(f"--tensor-model-parallel-size {size}: must be at least 1")
        counts = {
            "attention heads": self.settings["num_attention_heads"], "query groups": self.settings["query_groups"],
            "MLP width": self.settings["mlp_width"],
            "padded vocabulary": self.settings["make_vocab_size_divisible_by"] * saved,
        }  # fmt: skip
        for what, count in counts.items():
            if size != saved and count % size:
                raise UserError(f"--tensor-model-parallel-size {size}: does not divide the model's {what} ({count})")
        if launched not in (None, size):
            raise UserError(f"{launched} processes with --tensor-model-parallel-size {size}: start as many as that")
        return size


def open_run(folder: str, tokenizer_model: str | None, *, argument: str) -> TrainedRun:
    """The run of `folder`, which the user gave as `argument`, with its own tokenizer or a copy at `tokenizer_model`.

    Raises:
        UserError: no intact checkpoint with whole weights, or another tokenizer.
    """
    step = int(os.environ[_STEP]) if _STEP in os.environ else newest_with_weights(folder, argument=argument)
    saved = read_run(folder, step)
    settings = saved["settings"]
    if settings["zero_stage"] == 3:
        raise UserError(f"{argument}: a ZeRO-3 checkpoint holds no whole weights; give a run of ZeRO 0, 1 or 2")
    path = tokenizer_model or settings["tokenizer_model"]
    tokenizer = SentencePieceTokenizer.load(path)
    if tokenizer.sha256 != saved["tokenizer_sha256"]:
        raise UserError(f"--tokenizer-model {path}: not the tokenizer of this checkpoint; give that one")
    return TrainedRun(Path(folder), step, settings, tokenizer)


def newest_with_weights(folder: str, *, argument: str) -> int:
    """Step of the newest checkpoint whose settings and weights have their checksums; the first rank names those passed
    over on standard error. The optimizer's state is checked by its size alone.

    Raises:
        UserError: there is no such checkpoint in what the user gave as `argument`.
    """
    step, problems = newest_complete(folder, checksummed=(RUN, "mp_rank_*_model_states.pt"))
    if step is None and problems:
        raise UserError(f"{argument}: no checkpoint there is intact ({'; '.join(problems)[:400]})")
    if step is None:
        raise UserError(f"{argument}: holds no checkpoint; give the --save folder of a run")
    warn_passed_over(problems)
    return step


def generation_config(settings: dict[str, Any], size: int) -> TrainingConfig:
    """A run's settings for a model of `size` tensor-parallel ranks that is not trained, its vocabulary padded as the
    run padded it. Without fused RoPE, which takes no positions of each row's own.
    """
    known = {name: value for name, value in settings.items() if name in FIELDS}
    known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
    config = dataclasses.replace(TrainingConfig(), **known)
    multiple = config.make_vocab_size_divisible_by * config.tensor_model_parallel_size
    return dataclasses.replace(
        config, tensor_model_parallel_size=size, make_vocab_size_divisible_by=multiple // size,
        sequence_parallel=False, async_tensor_parallel=False, context_parallel_size=1,
        recompute_granularity=None, loss_chunk_tokens=0, apply_rope_fusion=False,
    )  # fmt: skip
