# SPDX-License-Identifier: Apache-2.0
"""Drawing tokens from logits, and the loop that generates with a `ModelDecoder`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from sparsek_megatron.errors import UserError
from sparsek_megatron.inference_model import ModelDecoder


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    temperature  divides the logits; 0 takes the likeliest token
    top_k        keep this many of the likeliest tokens; 0 keeps all
    top_p        then keep the likeliest tokens whose probabilities first add up to this; 1 keeps all
    seed         row i of a batch draws from a generator of its own, seeded with seed + i

    Raises UserError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature}: must be a finite number, at least 0")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k}: must be at least 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed}: must be at least 0 and below 2^63")

    def generators(self, rows: int) -> list[torch.Generator]:
        """One generator per row."""
        return [torch.Generator().manual_seed(self.seed + row) for row in range(rows)]


def probabilities(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """What is drawn from: (probabilities [b, n] fp64, likeliest first; tokens [b, n]) of logits [b, vocabulary].

    The likeliest token is always kept. Tokens of equal logits are in order of their ids.
    """
    scaled = logits.double() / sampling.temperature
    ordered, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered, tokens = ordered[:, : sampling.top_k], tokens[:, : sampling.top_k]
    weights = torch.softmax(ordered, dim=-1)
    before = weights.cumsum(-1) - weights
    weights = weights.masked_fill(before >= sampling.top_p, 0.0)
    return weights / weights.sum(-1, keepdim=True), tokens


def draw(logits: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """One token per row [b] int64, from logits [b, vocabulary] fp32."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    weights, tokens = probabilities(logits, sampling)
    uniform = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    place = torch.searchsorted(weights.cumsum(-1), uniform.to(logits.device)[:, None], right=True)
    last = (weights > 0).sum(-1, keepdim=True) - 1  # rounding may leave the sum a hair below 1
    return tokens.gather(-1, torch.minimum(place, last)).squeeze(-1)


@dataclass(frozen=True)
class Generated:
    """Token ids of each row's continuation, and how long it took."""

    tokens: list[list[int]]
    prompt_tokens: int
    first_token_seconds: float
    seconds: float  # after the first token

    @property
    def tokens_per_second(self) -> float:
        """Over all rows, from the first token on."""
        count = sum(map(len, self.tokens)) - len(self.tokens)
        return count / self.seconds if self.seconds > 0 and count > 0 else 0.0


def generate(
    decoder: ModelDecoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    vocab_size: int,
    end: int | None = None,
    sampling: Sampling | None = None,
    on_token: Callable[[int, int | None], None] | None = None,
) -> Generated:
    """Continue each prompt by up to `max_new_tokens` tokens, ending a row before the token `end`.

    `on_token(row, token)` is called for each new token, and with None where a row ends. Tokens from `vocab_size` on
    (padding of the embedding) are never drawn. All tensor-parallel ranks return the same tokens: the first one draws.

    Raises:
        UserError: logits that are not finite, naming row and position. The decoder can be used again with `prefill`.
    """
    sampling = sampling or Sampling()
    notify = on_token or (lambda row, token: None)
    generators = sampling.generators(len(prompts))
    begun = time.perf_counter()
    logits = decoder.prefill(prompts)
    continued: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    first = None
    for count in range(max_new_tokens):
        tokens = _agreed(
            _checked_draw(logits[:, :vocab_size], sampling, generators, prompts, count, open_rows)
        )
        drawn = tokens.tolist()
        first = first or time.perf_counter()
        for row in sorted(open_rows):
            if drawn[row] == end:
                open_rows.discard(row)
                notify(row, None)
            else:
                continued[row].append(drawn[row])
                notify(row, drawn[row])
        if not open_rows or count + 1 == max_new_tokens:
            break
        logits = decoder.step(tokens)
    for row in sorted(open_rows):
        notify(row, None)
    assert first is not None
    return Generated(continued, sum(map(len, prompts)), first - begun, time.perf_counter() - first)


def _checked_draw(logits, sampling, generators, prompts, count, open_rows) -> torch.Tensor:
    finite = torch.isfinite(logits).all(-1)
    tokens = draw(logits.nan_to_num(), sampling, generators)
    for row, good in enumerate(finite.tolist()):
        if not good and row in open_rows:
            raise UserError(
                f"prompt {row + 1}: the logits after {len(prompts[row]) + count} tokens are not finite; check the "
                "weights of this checkpoint, or use an earlier one"
            )
    return tokens


def _agreed(tokens: torch.Tensor) -> torch.Tensor:
    """The first tensor-parallel rank's tokens: sums may round differently on another machine."""
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        group: Any = parallel_state.get_tensor_model_parallel_group()
        dist.broadcast(tokens, parallel_state.get_tensor_model_parallel_src_rank(), group=group)
    return tokens
