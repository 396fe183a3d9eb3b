# SPDX-License-Identifier: Apache-2.0
"""The inspection program: a run of the trainer and a text in, `report.html`, `selection.png`, `statistics.json` out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.errors import UserError
from sparsek_megatron.files import atomic_write
from sparsek_megatron.flags import FlagParser
from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.generate import generation_config
from sparsek_megatron.training.launcher import is_launched, launch
from sparsek_megatron.training.run_folder import latest_step, read_run


def build_parser() -> FlagParser:
    """Flags of the program."""
    parser = FlagParser(
        prog="python -m sparsek_megatron.inspect", description="Show which tokens a trained model keeps."
    )
    parser.add_argument("checkpoint", help="run folder of pretrain_gpt.py; its newest checkpoint is read")
    parser.add_argument("--text", required=True, help="UTF-8 file to run the model on")
    parser.add_argument("--out", help="folder for the report; default: inspect in the run folder")
    parser.add_argument(
        "--max-tokens", type=int, help="tokens of the text to read; default: all the model takes"
    )
    parser.add_argument("--tokenizer-model", help="default: the one that the run used")
    return parser


def _run_config(folder: str, settings: dict[str, Any]) -> TrainingConfig:
    if settings["zero_stage"] == 3:
        raise UserError(
            f"{folder}: a ZeRO-3 checkpoint holds no whole weights; inspect one of ZeRO 0, 1 or 2"
        )
    return generation_config(settings, settings["tensor_model_parallel_size"])


def _tokens(path: str, tokenizer: SentencePieceTokenizer, longest: int, limit: int | None) -> list[int]:
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as err:
        raise UserError(f"--text {path}: {err.strerror}; give a text file") from None
    except UnicodeDecodeError as err:
        raise UserError(f"--text {path}: not UTF-8 at byte {err.start}; convert the file") from None
    if limit is not None and not 1 <= limit <= longest:
        raise UserError(f"--max-tokens {limit}: must be between 1 and the model's {longest} positions")
    ids = tokenizer.tokenize(text)
    if not ids:
        raise UserError(f"--text {path}: is empty; give a file with text")
    return ids[: limit or longest]


def token_texts(tokenizer: SentencePieceTokenizer, ids: list[int]) -> list[str]:
    """Text of each token; of bytes that make one character together, the first has it and the others nothing."""
    texts: list[str] = []
    while len(texts) < len(ids):
        start, size = len(texts), 1
        while "\N{REPLACEMENT CHARACTER}" in tokenizer.detokenize(ids[start : start + size]) and size < 4:
            size += 1
        together = tokenizer.detokenize(ids[start : start + size])
        texts += [together, *[""] * (min(size, len(ids) - start) - 1)]
    return texts


def inspect_program(argv: Sequence[str], program: str) -> None:
    """Run the program; with tensor parallelism it starts as many processes as the run had.

    Raises:
        UserError: for each thing that the user can fix.
    """
    args = build_parser().parse_args(argv)
    step = latest_step(args.checkpoint)
    if step is None:
        raise UserError(f"{args.checkpoint}: holds no checkpoint; give the --save folder of a run")
    saved = read_run(args.checkpoint, step)
    config = _run_config(args.checkpoint, saved["settings"])
    tokenizer_path = args.tokenizer_model or config.tokenizer_model
    tokenizer = SentencePieceTokenizer.load(tokenizer_path)
    if tokenizer.sha256 != saved["tokenizer_sha256"]:
        raise UserError(
            f"--tokenizer-model {tokenizer_path}: not the tokenizer of this checkpoint; give that one"
        )
    ids = _tokens(args.text, tokenizer, config.max_position_embeddings or config.seq_length, args.max_tokens)
    needed = config.sparsek_topk + config.sparsek_window
    if len(ids) <= needed:
        raise UserError(
            f"--text {args.text}: {len(ids)} tokens, and {needed} (topk + window) are always kept; give a longer one"
        )
    if config.tensor_model_parallel_size > 1 and not is_launched():
        launch(program, argv, config.tensor_model_parallel_size)
        return
    out = Path(args.out or Path(args.checkpoint) / "inspect")
    _inspect(config, tokenizer, Path(args.checkpoint), step, ids, out, name=Path(args.text).name)


def _inspect(
    config: TrainingConfig,
    tokenizer: SentencePieceTokenizer,
    folder: Path,
    step: int,
    ids: list[int],
    out: Path,
    *,
    name: str,
) -> None:
    import torch
    from megatron.core import parallel_state

    from sparsek_megatron.inspect.collect import recorded_scores, scores_of_all_heads
    from sparsek_megatron.inspect.heads import head_statistics
    from sparsek_megatron.inspect.page import render
    from sparsek_megatron.inspect.plot import draw
    from sparsek_megatron.training import checkpoint, parallel
    from sparsek_megatron.training.model import build_model, token_losses

    machine = parallel.initialize(config)
    with parallel.end_together(machine):
        model = build_model(config, tokenizer.vocab_size, on_gpu=machine.on_gpu)
        checkpoint.load_model(model, folder, step=step)
        with torch.no_grad(), recorded_scores(model.eval()) as found:
            token_losses(model, torch.tensor([ids], device=machine.device), None)
        group = parallel_state.get_tensor_model_parallel_group()
        groups = config.query_groups
        layers = {
            layer: (settings, scores_of_all_heads(scores, num_query_groups=groups, group=group))
            for layer, (settings, scores) in sorted(found.items())
        }
    parallel.shutdown()
    if not machine.is_first:
        return
    heads = [
        head
        for layer, (settings, scores) in layers.items()
        for head in head_statistics(scores[0], settings, layer=layer)
    ]
    settings = next(iter(layers.values()))[0]
    title = f"What {folder.name} keeps of {name} at step {step}"
    png = draw(heads, stride=settings.stride, title=title)
    page = render(token_texts(tokenizer, ids), heads, settings, png=png, title=title)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "selection.png", "wb") as stream:
        stream.write(png)
    with atomic_write(out / "report.html") as stream:
        stream.write(page)
    with atomic_write(out / "statistics.json") as stream:
        json.dump([head.summary() for head in heads], stream, indent=1)
    for warning in (w for head in heads for w in head.warnings):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{len(heads)} heads of {len(layers)} layers, {len(ids)} tokens: {out / 'report.html'}")
