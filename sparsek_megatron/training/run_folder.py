# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: names of its checkpoints, and whether one fits the run that would resume it.

It holds `latest` (a name) and `step_00000100/` folders, each with `run.json`: the settings that must fit.
"""

import json
import re
from pathlib import Path
from typing import Any

from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.errors import UserError
from sparsek_megatron.training.arguments import TrainingConfig, flag_of

LATEST = "latest"
NAME = re.compile(r"step_(\d{8})")

ARCHITECTURE = (
    "num_layers", "hidden_size", "mlp_width", "num_attention_heads", "query_groups", "head_dim", "rotary_base",
    "norm_epsilon", "untie_embeddings_and_output_weights", "make_vocab_size_divisible_by",
    "sparsek_topk", "sparsek_window", "sparsek_stride", "sparsek_pool", "sparsek_gate", "sparsek_hard_selection",
)  # fmt: skip
LAYOUT = ("tensor_model_parallel_size", "zero_stage")
# Changing one of these keeps training but not the trajectory: worth a line, not a refusal.
TRAJECTORY = (
    "seq_length", "micro_batch_size", "global_batch_size", "train_iters", "lr", "min_lr", "lr_decay_style",
    "lr_decay_iters", "lr_warmup_iters", "weight_decay", "clip_grad", "seed", "data_path", "train_data_path", "split",
)  # fmt: skip
DERIVED = {
    "mlp_width": "--ffn-hidden-size", "query_groups": "--num-query-groups", "head_dim": "--kv-channels"
}  # fmt: skip


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint taken after `step` steps."""
    return f"step_{step:08d}"


def latest_step(folder: str | Path) -> int | None:
    """Steps taken at the checkpoint that `latest` names; None where the folder has no checkpoint.

    Raises:
        UserError: `latest` names a checkpoint that is not there.
    """
    pointer = Path(folder) / LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    match = NAME.fullmatch(name)
    if match is None or not (Path(folder) / name / "run.json").is_file():
        raise UserError(f"{pointer}: names {name!r}, which is not a checkpoint there; write an existing step's name")
    return int(match.group(1))


def check_resume(config: TrainingConfig, world_size: int, tokenizer: SentencePieceTokenizer) -> int | None:
    """Steps already taken by the checkpoint to resume, after checking that it fits; None for a fresh start.

    Raises:
        UserError: nothing to load, a checkpoint of another architecture, layout or tokenizer, or a --save folder
            whose checkpoints this run would replace.
    """
    step = latest_step(config.load) if config.load else None
    if config.load and step is None and Path(config.load).resolve() != Path(config.save).resolve():
        raise UserError(f"--load {config.load}: holds no checkpoint; check the path or leave --load out")
    if step is None or Path(config.load or "").resolve() != Path(config.save).resolve():
        existing = latest_step(config.save)
        if existing is not None:
            raise UserError(
                f"--save {config.save}: already holds a checkpoint of step {existing}; "
                f"resume it with --load {config.save}, or choose another folder"
            )
    if step is None:
        return None
    saved = read_run(config.load or "", step)
    _require_same(config, saved, ARCHITECTURE, "of another architecture")
    _require_same(config, saved, LAYOUT, "in another layout")
    if saved["world_size"] != world_size:
        raise UserError(
            f"--load {config.load}: saved by {saved['world_size']} processes, this run has {world_size}; "
            f"start {saved['world_size']} (--nproc-per-node)"
        )
    if saved["tokenizer_sha256"] != tokenizer.sha256:
        raise UserError(
            f"--tokenizer-model {config.tokenizer_model}: not the tokenizer that {config.load} was trained with; "
            "give that model"
        )
    return step


def _require_same(config: TrainingConfig, saved: dict[str, Any], names: tuple[str, ...], what: str) -> None:
    for name in names:
        here, there = getattr(config, name), saved["settings"][name]
        if here != there:
            flag = DERIVED.get(name, flag_of(name))
            raise UserError(
                f"--load {config.load}: a checkpoint {what}: its {flag} is {there}, this run's is {here}; "
                f"use {flag} {there} or another --load and --save folder"
            )


def changed_settings(config: TrainingConfig, step: int) -> list[str]:
    """Lines about settings that differ from the checkpoint's and move the rest of the trajectory."""
    saved = read_run(config.load or "", step)["settings"]
    lines = []
    for name in TRAJECTORY:
        here = getattr(config, name)
        there = saved[name]
        if (list(here) if isinstance(here, tuple) else here) != there:
            lines.append(f"note: {flag_of(name)} was {there}, now {here}: the run continues on another trajectory")
    return lines


def read_run(folder: str | Path, step: int) -> dict[str, Any]:
    """`run.json` of a checkpoint."""
    path = Path(folder) / checkpoint_name(step) / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path}: damaged; name an older checkpoint in {Path(folder) / LATEST}") from None
