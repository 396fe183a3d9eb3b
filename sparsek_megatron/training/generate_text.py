# SPDX-License-Identifier: Apache-2.0
"""One process of the text generation program: model, weights, tokens, text."""

import contextlib
import sys
from collections.abc import Sequence

from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.errors import UserError
from sparsek_megatron.inference_model import ModelDecoder
from sparsek_megatron.inference_weights import load_weights
from sparsek_megatron.training import parallel
from sparsek_megatron.training.model import build_model
from sparsek_megatron.training.sampling import Generated, Sampling, generate
from sparsek_megatron.training.text_stream import TextStream
from sparsek_megatron.training.trained_run import TrainedRun, generation_config


def generate_text(
    run: TrainedRun,
    size: int,
    texts: Sequence[str],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    prefill_tokens: int,
    cuda_graph: bool,
) -> None:
    """Load the run's weights onto `size` tensor-parallel ranks and print each text with its continuation, on rank 0.

    A single prompt's text is printed while it is made, several prompts' texts as each ends.

    Raises:
        UserError: weights that do not fit or are damaged.
    """
    config, tokenizer = generation_config(run.settings, size), run.tokenizer
    machine = parallel.initialize(config)
    with parallel.end_together(machine):
        # The model says which settings it has; standard output is for text.
        with contextlib.redirect_stdout(sys.stderr):
            model = build_model(config, tokenizer.vocab_size, on_gpu=machine.on_gpu)
        load_weights(model, run)
        try:
            decoder = ModelDecoder(
                model, batch_size=len(prompts), max_sequence_length=max(map(len, prompts)) + max_new_tokens,
                prefill_tokens=prefill_tokens, cuda_graph=cuda_graph,
            )  # fmt: skip
        except NotImplementedError as err:
            raise UserError(str(err)) from None
        printer = _Printer(tokenizer, texts, prompts) if machine.is_first else None
        made = generate(
            decoder, prompts, max_new_tokens=max_new_tokens, vocab_size=tokenizer.vocab_size, end=tokenizer.eod,
            sampling=sampling, on_token=printer.token if printer else None,
        )  # fmt: skip
        if printer:
            print(
                summary(made, decoder.cache_bytes * config.tensor_model_parallel_size),
                file=sys.stderr,
                flush=True,
            )
    parallel.shutdown()


class _Printer:
    """Prompts and continuations to standard output."""

    def __init__(
        self, tokenizer: SentencePieceTokenizer, texts: Sequence[str], prompts: Sequence[Sequence[int]]
    ):
        self._alone = len(texts) == 1
        self._parts: list[list[str]] = [[text] for text in texts]
        write = [self._print if self._alone else parts.append for parts in self._parts]
        self._streams = [TextStream(tokenizer, prompt, to) for prompt, to in zip(prompts, write, strict=True)]
        if self._alone:
            self._print(texts[0])

    def token(self, row: int, token: int | None) -> None:
        """A new token of a row; None where it ends."""
        if token is not None:
            self._streams[row].add(token)
            return
        self._streams[row].end()
        if self._alone:
            self._print("\n")
        else:
            self._print(f"--- prompt {row + 1} of {len(self._parts)}\n{''.join(self._parts[row])}\n")

    def _print(self, text: str) -> None:
        print(text, end="", flush=True)


def summary(made: Generated, cache_bytes: int) -> str:
    """The line after the text: tokens, times, and bytes of the caches over all ranks."""
    rows = len(made.tokens)
    return (
        f"{made.prompt_tokens} prompt tokens, first token after {made.first_token_seconds:.2f} s; "
        f"{sum(map(len, made.tokens))} new tokens, {made.tokens_per_second:.1f} tokens/s; "
        f"cache {cache_bytes / rows:,.0f} bytes per sequence, {rows} {'sequence' if rows == 1 else 'sequences'}"
    )
