# SPDX-License-Identifier: Apache-2.0
"""Text from a trained checkpoint, by the training forward."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.training import checkpoint, parallel
from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.model import build_model, token_losses

_BUCKET = 64  # lengths are padded to a multiple, so that a GPU compiles few shapes


def print_sample(
    config: TrainingConfig,
    tokenizer: SentencePieceTokenizer,
    folder: Path,
    step: int,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
) -> None:
    """Load the weights of a checkpoint and print the prompt with its continuation, on rank 0."""
    machine = parallel.initialize(config)
    model = build_model(config, tokenizer.vocab_size, on_gpu=machine.on_gpu)
    checkpoint.load_model(model, folder, step=step)
    ids = generate(
        model.eval(), prompt, tokenizer, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
    )
    if machine.is_first:
        sys.stdout.write(tokenizer.detokenize([*prompt, *ids]) + "\n")
        sys.stdout.flush()
    parallel.shutdown()


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    prompt: Sequence[int],
    tokenizer: SentencePieceTokenizer,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
) -> list[int]:
    """Ids of up to `max_new_tokens` new tokens, ending before an end-of-document token.

    Runs the whole prefix through the training forward for each token. The prefix is padded on the right, which causal
    attention cannot see. Call it on every tensor-parallel rank: all draw the same token from the same logits.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    multiple = _BUCKET * parallel_state.get_tensor_model_parallel_world_size()
    ids = list(prompt)
    for _ in range(max_new_tokens):
        padded = torch.zeros(1, -(-len(ids) // multiple) * multiple, dtype=torch.int64)
        padded[0, : len(ids)] = torch.tensor(ids)
        logits = token_losses(model, padded.to(device), None)[:, len(ids) - 1]
        whole = gather_from_tensor_model_parallel_region(logits)[0, : tokenizer.vocab_size].float().cpu()
        token = _draw(whole, temperature, top_k, generator)
        if token == tokenizer.eod:
            break
        ids.append(token)
    return ids[len(prompt) :]


def _draw(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))
