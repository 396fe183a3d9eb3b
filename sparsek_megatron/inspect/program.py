# SPDX-License-Identifier: Apache-2.0
"""The inspection program: a run of the trainer and a text in, `report.html`, `selection.png`, `statistics.json` out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.errors import UserError
from sparsek_megatron.files import atomic_write
from sparsek_megatron.flags import FlagParser
from sparsek_megatron.training.launcher import is_launched, launch
from sparsek_megatron.training.trained_run import (
    TENSOR_PARALLEL_HELP,
    TrainedRun,
    generation_config,
    open_run,
)


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
    parser.add_argument("--tensor-model-parallel-size", type=int, metavar="N", help=TENSOR_PARALLEL_HELP)
    return parser


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
    """Run the program; with tensor parallelism it starts the processes.

    Raises:
        UserError: for each thing that the user can fix.
    """
    args = build_parser().parse_args(argv)
    run = open_run(args.checkpoint, args.tokenizer_model, argument=args.checkpoint)
    ids = _tokens(args.text, run.tokenizer, run.longest, args.max_tokens)
    needed = run.settings["sparsek_topk"] + run.settings["sparsek_window"]
    if len(ids) <= needed:
        raise UserError(
            f"--text {args.text}: {len(ids)} tokens, and {needed} (topk + window) are always kept; give a longer one"
        )
    size = run.tensor_parallel_size(args.tensor_model_parallel_size)
    if size > 1 and not is_launched():
        run.choose_for_launched()
        launch(program, argv, size)
        return
    _inspect(run, size, ids, Path(args.out or run.folder / "inspect"), name=Path(args.text).name)


def _inspect(run: TrainedRun, size: int, ids: list[int], out: Path, *, name: str) -> None:
    import torch
    from megatron.core import parallel_state

    from sparsek_megatron.inference_weights import load_weights
    from sparsek_megatron.inspect.collect import recorded_scores, scores_of_all_heads
    from sparsek_megatron.inspect.heads import head_statistics
    from sparsek_megatron.inspect.page import render
    from sparsek_megatron.inspect.plot import draw
    from sparsek_megatron.training import parallel
    from sparsek_megatron.training.model import build_model, token_losses

    config = generation_config(run.settings, size)
    machine = parallel.initialize(config)
    with parallel.end_together(machine):
        model = build_model(config, run.tokenizer.vocab_size, on_gpu=machine.on_gpu)
        load_weights(model, run)
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
    title = f"What {run.folder.name} keeps of {name} at step {run.step}"
    png = draw(heads, stride=settings.stride, title=title)
    page = render(token_texts(run.tokenizer, ids), heads, settings, png=png, title=title)
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
