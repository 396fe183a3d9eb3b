# SPDX-License-Identifier: Apache-2.0
"""The text generation program: flags and their checks, then prompts in and text out. See `examples/generate.py`."""

import dataclasses
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.errors import UserError
from sparsek_megatron.flags import FlagParser
from sparsek_megatron.training.arguments import FIELDS, TrainingConfig
from sparsek_megatron.training.launcher import is_launched, launch, world_size_of_environment
from sparsek_megatron.training.run_folder import RUN, newest_complete, read_run, warn_passed_over

_STDIN_COPY = "SPARSEK_GENERATE_STDIN"  # launched processes read the launcher's standard input from this file
_STEP = "SPARSEK_GENERATE_STEP"  # and take the checkpoint that the launcher has checked and chosen


def build_parser() -> FlagParser:
    """Flags of the program."""
    parser = FlagParser(
        description="Generate text from a checkpoint of pretrain_gpt.py. Prompts come from --prompt and --prompt-file, "
        "or from standard input; several are continued together. Text goes to standard output, times to standard error."
    )
    parser.add_argument("--load", required=True, help="the run folder")
    parser.add_argument(
        "--prompt", action="append", default=[], help="text to continue; repeat it for several"
    )
    parser.add_argument(
        "--prompt-file",
        action="append",
        default=[],
        help="file with one prompt, - for standard input; may be repeated",
    )
    parser.add_argument("--tokenizer-model", help="default: the one that the run used")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument(
        "--top-k", type=int, default=0, help="sample among this many likeliest tokens; 0 for all"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample among the likeliest tokens whose probabilities reach this",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tensor-model-parallel-size", type=int, default=None,
        help="processes that share each layer; default as many as in the run where there are GPUs for them, else 1",
    )  # fmt: skip
    parser.add_argument(
        "--prefill-tokens",
        type=int,
        default=16_384,
        help="tokens of one forward of the prompts: bounds the memory",
    )
    parser.add_argument(
        "--no-cuda-graph", action="store_true", help="run every step of the model kernel by kernel"
    )
    return parser


def generate_program(argv: Sequence[str], program: str) -> None:
    """Run the program.

    Raises:
        UserError: for each thing that the user can fix.
    """
    args = build_parser().parse_args(argv)
    for flag in ("max_new_tokens", "prefill_tokens", "tensor_model_parallel_size"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value}: must be at least 1")
    step = int(os.environ[_STEP]) if _STEP in os.environ else newest_with_weights(args.load)
    saved = read_run(args.load, step)
    if saved["settings"]["zero_stage"] == 3:
        raise UserError(
            f"--load {args.load}: a ZeRO-3 checkpoint holds no whole weights; generate from ZeRO 0, 1 or 2"
        )
    tokenizer_path = args.tokenizer_model or saved["settings"]["tokenizer_model"]
    tokenizer = SentencePieceTokenizer.load(tokenizer_path)
    if tokenizer.sha256 != saved["tokenizer_sha256"]:
        raise UserError(
            f"--tokenizer-model {tokenizer_path}: not the tokenizer of this checkpoint; give that one"
        )
    texts = read_prompts(args.prompt, args.prompt_file)
    prompts = [tokenizer.tokenize(text) for _, text in texts]
    for (source, _), prompt in zip(texts, prompts, strict=True):
        if not prompt:
            raise UserError(f"{source}: the prompt is empty; give some text to continue")
    settings = saved["settings"]
    longest = settings["max_position_embeddings"] or settings["seq_length"]
    most = max(map(len, prompts))
    if most + args.max_new_tokens > longest:
        raise UserError(
            f"--max-new-tokens {args.max_new_tokens}: with a prompt of {most} tokens this passes the model's "
            f"{longest} positions; use at most {max(0, longest - most)}"
        )
    size = _tensor_parallel_size(args.tensor_model_parallel_size, settings)
    config = generation_config(settings, size)
    if size > 1 and not is_launched():
        os.environ[_STEP] = str(step)
        _launch_with_input(program, argv, size, texts)
        return
    if is_launched() and world_size_of_environment() != size:
        raise UserError(
            f"{world_size_of_environment()} processes with --tensor-model-parallel-size {size}: start as many as that"
        )
    from sparsek_megatron.training.generate_text import generate_text  # megatron-core: seconds
    from sparsek_megatron.training.sampling import Sampling

    generate_text(
        config, tokenizer, Path(args.load), step, settings["tensor_model_parallel_size"],
        [text for _, text in texts], prompts,
        max_new_tokens=args.max_new_tokens,
        sampling=Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed),
        prefill_tokens=args.prefill_tokens, cuda_graph=not args.no_cuda_graph,
    )  # fmt: skip


def newest_with_weights(folder: str) -> int:
    """Step of the newest checkpoint whose settings and weights have their checksums; the first rank names those passed
    over on standard error. The optimizer's state, which generation does not need, is checked by its size alone.

    Raises:
        UserError: there is no such checkpoint.
    """
    step, problems = newest_complete(folder, checksummed=(RUN, "mp_rank_*_model_states.pt"))
    if step is None and problems:
        raise UserError(f"--load {folder}: no checkpoint there is intact ({'; '.join(problems)[:400]})")
    if step is None:
        raise UserError(f"--load {folder}: holds no checkpoint; give the --save folder of a run")
    warn_passed_over(problems)
    return step


def read_prompts(prompts: Sequence[str], files: Sequence[str]) -> list[tuple[str, str]]:
    """(where it came from, its text) of each prompt: the texts, then the files; standard input where neither is given.

    Raises:
        UserError: a prompt that is not UTF-8 text, a file that cannot be read, or no prompt at all.
    """
    if not prompts and not files:
        if _STDIN_COPY not in os.environ and (sys.stdin is None or sys.stdin.isatty()):
            raise UserError("no prompt: give --prompt TEXT, --prompt-file FILE, or text on standard input")
        files = ["-"]
    contents = [("--prompt", text.encode("utf-8", "surrogateescape")) for text in prompts]
    contents += [(f"--prompt-file {name}", _content(name)) for name in files]
    found = []
    for source, content in contents:
        try:
            found.append((source, content.decode("utf-8")))
        except UnicodeDecodeError as err:
            raise UserError(f"{source}: not UTF-8 text (byte {err.start}); convert it") from None
    return found


def _content(name: str) -> bytes:
    """A prompt file; - is standard input."""
    copy = os.environ.get(_STDIN_COPY)
    try:
        if name != "-":
            return Path(name).read_bytes()
        if copy:
            return Path(copy).read_bytes()
        if sys.stdin is None:
            raise UserError("--prompt-file -: standard input is closed; give a file or --prompt TEXT")
        return sys.stdin.buffer.read()
    except OSError as err:
        raise UserError(f"--prompt-file {name}: cannot be read ({os.strerror(err.errno or 0)})") from None


def _launch_with_input(program: str, argv: Sequence[str], size: int, texts: list[tuple[str, str]]) -> None:
    """Start the processes; what this one read from standard input goes to them through a temporary file."""
    read = [text for source, text in texts if source == "--prompt-file -"]
    with tempfile.TemporaryDirectory() as folder:
        if read:
            copy = Path(folder) / "stdin"
            copy.write_bytes(read[0].encode())
            os.environ[_STDIN_COPY] = str(copy)
        launch(program, argv, size)


def _tensor_parallel_size(asked: int | None, settings: dict) -> int:
    """The size to generate with; raises UserError where the run's heads or vocabulary do not divide by it."""
    saved = settings["tensor_model_parallel_size"]
    size = asked
    if size is None and is_launched():
        size = world_size_of_environment()
    if size is None:
        import torch

        size = saved if torch.cuda.device_count() >= saved else 1
    units = settings["make_vocab_size_divisible_by"] * saved
    for count, what in (
        (settings["num_attention_heads"], "attention heads"),
        (settings["query_groups"], "query groups"),
        (units, "padded vocabulary"),
    ):
        if size != saved and count % size:
            raise UserError(
                f"--tensor-model-parallel-size {size}: does not divide the model's {what} ({count})"
            )
    return size


def generation_config(settings: dict, size: int) -> TrainingConfig:
    """The run's settings for a model of `size` tensor-parallel ranks that is not trained, its vocabulary padded as the
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
