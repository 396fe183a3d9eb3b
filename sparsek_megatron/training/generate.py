# SPDX-License-Identifier: Apache-2.0
"""The text generation program up to its checks. See `examples/generate_text.py`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.errors import UserError
from sparsek_megatron.flags import FlagParser
from sparsek_megatron.training.arguments import FIELDS, TrainingConfig
from sparsek_megatron.training.launcher import is_launched, launch
from sparsek_megatron.training.run_folder import latest_step, read_run


def build_parser() -> FlagParser:
    """Flags of the program."""
    parser = FlagParser(description="Generate text from a checkpoint of pretrain_gpt.py.")
    parser.add_argument("--load", required=True, help="the run folder; starts as many processes as its TP size")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--tokenizer-model", help="default: the one that the run used")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="sample among this many likeliest tokens; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def generate_program(argv: Sequence[str], program: str) -> None:
    """Run the program.

    Raises:
        UserError: for each thing that the user can fix.
    """
    args = build_parser().parse_args(argv)
    step = latest_step(args.load)
    if step is None:
        raise UserError(f"--load {args.load}: holds no checkpoint; give the --save folder of a run")
    if args.max_new_tokens < 1 or args.temperature < 0 or args.top_k < 0:
        raise UserError("--max-new-tokens must be at least 1, --temperature and --top-k at least 0")
    saved = read_run(args.load, step)
    if saved["settings"]["zero_stage"] == 3:
        raise UserError(f"--load {args.load}: a ZeRO-3 checkpoint holds no whole weights; generate from ZeRO 0, 1 or 2")
    config = _config(saved["settings"])
    tokenizer_path = args.tokenizer_model or config.tokenizer_model
    tokenizer = SentencePieceTokenizer.load(tokenizer_path)
    if tokenizer.sha256 != saved["tokenizer_sha256"]:
        raise UserError(f"--tokenizer-model {tokenizer_path}: not the tokenizer of this checkpoint; give that one")
    prompt = tokenizer.tokenize(args.prompt) or [tokenizer.eod]
    longest = config.max_position_embeddings or config.seq_length
    if len(prompt) + args.max_new_tokens > longest:
        raise UserError(
            f"--max-new-tokens {args.max_new_tokens}: with a prompt of {len(prompt)} tokens this passes the model's "
            f"{longest} positions; use at most {max(0, longest - len(prompt))}"
        )
    if config.tensor_model_parallel_size > 1 and not is_launched():
        launch(program, argv, config.tensor_model_parallel_size)
        return
    from sparsek_megatron.training.sampling import print_sample  # megatron-core: seconds

    print_sample(
        config, tokenizer, Path(args.load), step, prompt, max_new_tokens=args.max_new_tokens,
        temperature=args.temperature, top_k=args.top_k, seed=args.seed,
    )  # fmt: skip


def _config(settings: dict[str, object]) -> TrainingConfig:
    """The run's settings; its parallel layout is that of one data-parallel replica."""
    known = {name: value for name, value in settings.items() if name in FIELDS}
    tuples = {name: tuple(v) for name, v in known.items() if isinstance(v, list)}
    return dataclasses.replace(TrainingConfig(), **(known | tuples))  # pyright: ignore[reportArgumentType]
