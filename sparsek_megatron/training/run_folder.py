# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: names of its checkpoints, and whether one fits the run that would resume it.

It holds `latest` (a name) and `step_00000100/` folders, each with `run.json`: the settings that must fit, and
`manifest.json`. A run that goes back to an older step renames the newer ones to `given_up_step_...` when it saves.
"""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.errors import UserError
from sparsek_megatron.training.arguments import TrainingConfig, flag_of
from sparsek_megatron.training.manifest import check_contents, check_sizes

LATEST = "latest"
RUN = "run.json"
ASIDE = "given_up_"
NAME = re.compile(r"step_(\d{8})")

ARCHITECTURE = (
    "num_layers", "hidden_size", "mlp_width", "num_attention_heads", "query_groups", "head_dim", "rotary_base",
    "norm_epsilon", "untie_embeddings_and_output_weights",
    "sparsek_topk", "sparsek_window", "sparsek_stride", "sparsek_pool", "sparsek_gate", "sparsek_hard_selection",
)  # fmt: skip
LAYOUT = ("tensor_model_parallel_size", "zero_stage")
RESHARDABLE = (1, 2)
# Changing one of these keeps training but not the trajectory, or what it is measured by: worth a line, not a refusal.
TRAJECTORY = (
    "seq_length", "micro_batch_size", "global_batch_size", "train_iters", "lr", "min_lr", "lr_decay_style",
    "lr_decay_iters", "lr_warmup_iters", "weight_decay", "clip_grad", "adam_beta1", "adam_beta2", "adam_eps",
    "sparsek_lr_mult", "seed", "data_path", "train_data_path", "split",
)  # fmt: skip
DERIVED = {
    "mlp_width": "--ffn-hidden-size", "query_groups": "--num-query-groups", "head_dim": "--kv-channels"
}  # fmt: skip


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint taken after `step` steps."""
    return f"step_{step:08d}"


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoint folders of a run, ascending, whole or not."""
    matches = [NAME.fullmatch(path.name) for path in folder.glob("step_*") if path.is_dir()]
    return sorted(int(match[1]) for match in matches if match)


def candidates(folder: str | Path) -> tuple[list[int], str | None]:
    """(steps of the checkpoints to try, newest first; what is wrong with `latest`, in words, if anything).

    They begin with the one that `latest` names: newer ones belong to a trajectory that is being given up, or were
    renamed an instant before a kill. Where `latest` cannot be read, all are tried.
    """
    root = Path(folder)
    pointer = root / LATEST
    steps = saved_steps(root)[::-1]
    if not pointer.is_file():
        return (steps, f"{pointer}: missing") if steps else ([], None)
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        name = ""
    match = NAME.fullmatch(name)
    if match is None:
        return steps, f"{pointer}: damaged, it names {name!r}"
    newest = int(match[1])
    problem = None if newest in steps else f"{pointer}: names {name}, which is not there"
    return [step for step in steps if step <= newest], problem


def newest_complete(folder: str | Path, *, checksummed: Sequence[str] = (RUN,)) -> tuple[int | None, list[str]]:
    """(step of the newest checkpoint that is complete as far as file sizes tell, files that match a pattern of
    `checksummed` by checksum too; None where there is none; what is wrong with those passed over, in words).
    """
    steps, problem = candidates(folder)
    problems = [problem] if problem else []
    for step in steps:
        path = Path(folder) / checkpoint_name(step)
        names = [file.name for pattern in checksummed for file in path.glob(pattern)]
        problem = check_sizes(path) or check_contents(path, names=names)
        if problem is None:
            return step, problems
        problems.append(f"{path}: {problem}")
    return None, problems


def warn_passed_over(problems: Sequence[str]) -> None:
    """Say on the first rank's stderr what was wrong with checkpoints that are passed over."""
    if os.environ.get("RANK", "0") == "0":
        for problem in problems:
            print(f"warning: {problem}; it is passed over", file=sys.stderr)


def latest_step(folder: str | Path) -> int | None:
    """`newest_complete`, with what was passed over said on the first rank's stderr; None where there is no checkpoint.

    Raises:
        UserError: there are checkpoints, but none is complete.
    """
    step, problems = newest_complete(folder)
    if step is None and problems:
        raise UserError(f"{folder}: no checkpoint there is complete ({'; '.join(problems)[:400]})")
    warn_passed_over(problems)
    return step


def number_type(config: TrainingConfig) -> str:
    """Of the weights in this run: "bf16" or "fp32", by --bf16 or else by whether this machine has a GPU."""
    bf16 = config.bf16
    if bf16 is None:
        import torch  # seconds, for programs that only look at a folder

        bf16 = torch.cuda.is_available()
    return "bf16" if bf16 else "fp32"


def check_resume(
    config: TrainingConfig, world_size: int, tokenizer: SentencePieceTokenizer, *, step: int | None = None
) -> int | None:
    """Steps already taken by the checkpoint to resume, after checking that it fits; None for a fresh start.

    step: the checkpoint to look at where it has been chosen; by default the newest complete one of --load.

    Raises:
        UserError: nothing to load, a checkpoint of another architecture or tokenizer or of a layout that cannot be
            changed into this one, or a --save folder whose checkpoints this run would replace.
    """
    if config.load and step is None:
        step, problems = newest_complete(config.load)
        if step is None and problems:
            raise UserError(f"--load {config.load}: no checkpoint there is complete ({'; '.join(problems)[:400]})")
    if config.load and step is None and Path(config.load).resolve() != Path(config.save).resolve():
        raise UserError(f"--load {config.load}: holds no checkpoint; check the path or leave --load out")
    if step is None or Path(config.load or "").resolve() != Path(config.save).resolve():
        existing, _ = newest_complete(config.save)
        if existing is not None:
            raise UserError(
                f"--save {config.save}: already holds a checkpoint of step {existing}; "
                f"resume it with --load {config.save}, or choose another folder"
            )
    if step is None:
        return None
    saved = read_run(config.load or "", step)
    _require_same(config, saved, ARCHITECTURE, "of another architecture")
    if not same_layout(config, world_size, saved):
        _require_changeable(config, world_size, saved)
    _require_same_vocabulary(config, saved, tokenizer.vocab_size)
    if saved["tokenizer_sha256"] != tokenizer.sha256:
        raise UserError(
            f"--tokenizer-model {config.tokenizer_model}: not the tokenizer that {config.load} was trained with; "
            "give that model"
        )
    return step


def same_layout(config: TrainingConfig, world_size: int, saved: dict[str, Any]) -> bool:
    """Whether this run has the processes, tensor-parallel size, ZeRO stage and number type of a `run.json`.

    DeepSpeed names its files, and what they hold, by all of these.
    """
    own = number_type(config)
    return (
        saved["world_size"] == world_size
        and _saved_number_type(saved, own) == own
        and all(saved["settings"][name] == getattr(config, name) for name in LAYOUT)
    )


def _saved_number_type(saved: dict[str, Any], own: str) -> str:
    """Of a `run.json`; an older version's names none, and is taken to have `own` where --[no-]bf16 was not given."""
    given = {True: "bf16", False: "fp32", None: own}[saved["settings"].get("bf16")]
    return saved.get("number_type", given)


def _require_changeable(config: TrainingConfig, world_size: int, saved: dict[str, Any]) -> None:
    """ZeRO 1 and 2 checkpoints can be read in any layout, and in either number type, of ZeRO 1 and 2."""
    there, here = saved["settings"]["zero_stage"], config.zero_stage
    if there in RESHARDABLE and here in RESHARDABLE:
        return
    settings, own = saved["settings"], number_type(config)
    differs = {
        "--zero-stage": (there, here),
        "--tensor-model-parallel-size": (settings["tensor_model_parallel_size"], config.tensor_model_parallel_size),
        "--nproc-per-node (processes in all)": (saved["world_size"], world_size),
        "number type (--[no-]bf16)": (_saved_number_type(saved, own), own),
    }
    flag, (before, now) = next((name, pair) for name, pair in differs.items() if pair[0] != pair[1])
    fix = {"bf16": "--bf16 on a GPU", "fp32": "--no-bf16"}.get(before, before)
    raise UserError(
        f"--load {config.load}: in another layout: its {flag} is {before}, this run's is {now}. DeepSpeed's files of "
        f"ZeRO-{there if there not in RESHARDABLE else here} hold no layout-independent state; only ZeRO 1 and 2 "
        f"change layout: use {fix}"
    )


def _require_same(config: TrainingConfig, saved: dict[str, Any], names: tuple[str, ...], what: str) -> None:
    for name in names:
        here, there = getattr(config, name), saved["settings"][name]
        if here != there:
            flag = DERIVED.get(name, flag_of(name))
            raise UserError(
                f"--load {config.load}: a checkpoint {what}: its {flag} is {there}, this run's is {here}; "
                f"use {flag} {there} or another --load and --save folder"
            )


def _require_same_vocabulary(config: TrainingConfig, saved: dict[str, Any], vocab_size: int) -> None:
    """The padded rows of the embedding take part in the softmax: their number belongs to the model."""
    names = ("make_vocab_size_divisible_by", "tensor_model_parallel_size")
    there = dataclasses.replace(config, **{name: saved["settings"][name] for name in names})
    rows, before = config.padded_vocab_size(vocab_size), there.padded_vocab_size(vocab_size)
    if rows != before:
        unit = there.make_vocab_size_divisible_by * there.tensor_model_parallel_size
        raise UserError(
            f"--make-vocab-size-divisible-by {config.make_vocab_size_divisible_by}: pads the vocabulary to {rows}, the "
            f"checkpoint's is {before}; use {unit // config.tensor_model_parallel_size} at this tensor-parallel size"
        )


def changed_settings(config: TrainingConfig, step: int) -> list[str]:
    """Lines about settings that differ from the checkpoint's and change the rest of the run's curves."""
    saved = read_run(config.load or "", step)["settings"]
    consequences: dict[str, str] = dict.fromkeys(TRAJECTORY, "the run continues on another trajectory")
    if config.eval_iters and saved["eval_iters"]:
        other = "validation losses from here on are those of other data"
        consequences |= {"valid_data_path": other, "eval_iters": other}
    else:
        consequences["eval_iters"] = "nothing is validated from here on" if saved["eval_iters"] else "validation begins"
    lines = []
    for name, consequence in consequences.items():
        here = getattr(config, name)
        here = list(here) if isinstance(here, tuple) else here
        if here != saved[name]:
            lines.append(f"note: {flag_of(name)} was {saved[name]}, now {here}: {consequence}")
    return lines


def read_run(folder: str | Path, step: int) -> dict[str, Any]:
    """`run.json` of a checkpoint."""
    path = Path(folder) / checkpoint_name(step) / RUN
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path}: damaged; name an older checkpoint in {Path(folder) / LATEST}") from None
