# SPDX-License-Identifier: Apache-2.0
"""The chunked loss of a GPT, and the other memory options with it, against whole logits on one rank, in float32."""

from __future__ import annotations

from typing import Any

import torch
from mcore_harness import (
    RECOMPUTE,
    batch,
    build_gpt,
    full_gradients,
    full_weights,
    load_full,
    parallel,
    randomise,
    relative_errors,
    tiny_config,
)
from worker import case

from sparsek_megatron import SparseKConfig, get_sparsek_layer_spec
from sparsek_megatron.memory import use_checkpoint_offload, use_chunked_loss, use_tiled_mlp

# Every key is attended: rounding cannot change a selection, so float32 shows what the loss does and nothing else.
SPARSEK = SparseKConfig(topk=32, window=32, stride=4, reference_length=64)



def run(
    *, tp: int, sequence_parallel: bool = False, chunk_tokens: int | None = None, chunked: bool = True,
    tied: bool = False, weights: dict[str, torch.Tensor] | None = None,
    everything: bool = False,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:  # fmt: skip
    """(whole weights; losses, logits without labels, and whole gradients of unevenly weighted losses)."""
    with parallel(tp=tp):
        config = tiny_config(sequence_parallel=sequence_parallel, **(RECOMPUTE if everything else {}))
        spec = get_sparsek_layer_spec(config, sparsek=SPARSEK)
        model = build_gpt(config, spec, share_embeddings_and_output_weights=tied)
        if weights is None:
            randomise(model)
            weights = full_weights(model)
        else:
            load_full(model, weights)
        if chunked:
            model = use_chunked_loss(model, chunk_tokens=chunk_tokens)
        if everything:
            use_checkpoint_offload(model, num_layers=2, recompute_inputs=1)
            model = use_tiled_mlp(model, tile_tokens=24)
        tokens, positions, labels = batch()
        importance = torch.linspace(0.0, 2.0, tokens.numel()).view(tokens.shape)
        losses = model(tokens, positions, None, labels=labels)
        (losses * importance).sum().backward()
        gradients = full_gradients(model)
        with torch.no_grad():
            positional = model(tokens, positions, None, None, labels)
            logits = model(tokens, positions, None)
        assert torch.equal(positional, losses)
        return weights, {
            "losses": losses.detach(),
            "logit width": torch.tensor(logits.shape[-1] * tp),
            **gradients,
        }


def errors(**layout: Any) -> dict[str, float]:
    tied = layout.get("tied", False)
    weights, want = run(tp=1, chunked=False, tied=tied)
    _, got = run(weights=weights, **layout)
    return relative_errors(got, want)


@case
def loss_on_one_rank() -> dict[str, float]:
    return errors(tp=1, chunk_tokens=24)


@case
def loss_on_two_ranks() -> dict[str, float]:
    return errors(tp=2, chunk_tokens=24)


@case
def loss_under_sequence_parallelism() -> dict[str, float]:
    return errors(tp=2, sequence_parallel=True, chunk_tokens=24)


@case
def loss_on_four_ranks_a_token_at_a_time() -> dict[str, float]:
    return errors(tp=4, sequence_parallel=True, chunk_tokens=1)


@case
def loss_of_tied_embeddings() -> dict[str, float]:
    return errors(tp=2, sequence_parallel=True, chunk_tokens=40, tied=True)


@case
def loss_in_one_chunk() -> dict[str, float]:
    return errors(tp=2, sequence_parallel=True)


@case
def loss_with_tiled_mlp_and_offloaded_checkpoints() -> dict[str, float]:
    return errors(tp=2, sequence_parallel=True, chunk_tokens=24, everything=True)
