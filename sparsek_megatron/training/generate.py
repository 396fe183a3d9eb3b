# SPDX-License-Identifier: Apache-2.0
"""The text generation program: flags and their checks, then prompts in and text out. See `examples/generate.py`."""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sparsek_megatron.errors import UserError
from sparsek_megatron.flags import FlagParser
from sparsek_megatron.training.launcher import is_launched, launch
from sparsek_megatron.training.trained_run import TENSOR_PARALLEL_HELP, open_run

_STDIN_COPY = "SPARSEK_GENERATE_STDIN"  # launched processes read the launcher's standard input from this file


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
    parser.add_argument("--tensor-model-parallel-size", type=int, metavar="N", help=TENSOR_PARALLEL_HELP)
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
    for flag in ("max_new_tokens", "prefill_tokens"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    run = open_run(args.load, args.tokenizer_model, argument=f"--load {args.load}")
    texts = read_prompts(args.prompt, args.prompt_file)
    prompts = [run.tokenizer.tokenize(text) for _, text in texts]
    for (source, _), prompt in zip(texts, prompts, strict=True):
        if not prompt:
            raise UserError(f"{source}: the prompt is empty; give some text to continue")
    most = max(map(len, prompts))
    if most + args.max_new_tokens > run.longest:
        raise UserError(
            f"--max-new-tokens {args.max_new_tokens}: with a prompt of {most} tokens this passes the model's "
            f"{run.longest} positions; use at most {max(0, run.longest - most)}"
        )
    size = run.tensor_parallel_size(args.tensor_model_parallel_size)
    if size > 1 and not is_launched():
        run.choose_for_launched()
        _launch_with_input(program, argv, size, texts)
        return
    from sparsek_megatron.training.generate_text import generate_text  # megatron-core: seconds
    from sparsek_megatron.training.sampling import Sampling

    generate_text(
        run, size, [text for _, text in texts], prompts,
        max_new_tokens=args.max_new_tokens,
        sampling=Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed),
        prefill_tokens=args.prefill_tokens, cuda_graph=not args.no_cuda_graph,
    )  # fmt: skip


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
