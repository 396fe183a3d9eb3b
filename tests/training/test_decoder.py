# SPDX-License-Identifier: Apache-2.0
"""Generation from a model: logits and selection of the training forward, constant memory, how rows end, refusals."""

import pytest
import torch
from sparsek_kernels import select

from sparsek_megatron.errors import UserError
from sparsek_megatron.inference_model import ModelDecoder
from sparsek_megatron.training.model import token_losses
from sparsek_megatron.training.sampling import generate

LONGEST = 64
PROMPTS = [[5, 9, 300, 41], [7], [17, 8, 120, 33], list(range(20, 51))]


@torch.no_grad()
def test_greedy_tokens_are_the_likeliest_of_the_training_forward(model):
    decoder = ModelDecoder(model, batch_size=4, max_sequence_length=LONGEST, prefill_tokens=9)
    made = generate(decoder, PROMPTS, max_new_tokens=30, vocab_size=512)
    for prompt, tokens in zip(PROMPTS, made.tokens, strict=True):
        logits = token_losses(model, torch.tensor([prompt + tokens]), None)[0, len(prompt) - 1 : -1, :512]
        assert logits.argmax(-1).tolist() == tokens and len(set(tokens)) > 1
    assert made.prompt_tokens == 40 and made.first_token_seconds > 0 and made.tokens_per_second > 0


@torch.no_grad()
def test_logits_of_prompts_in_pieces_and_steps_are_those_of_the_training_forward(model):
    decoder = ModelDecoder(model, batch_size=4, max_sequence_length=LONGEST, prefill_tokens=12)
    steps = torch.randint(0, 512, (30, 4), generator=torch.Generator().manual_seed(0))
    logits = [decoder.prefill(PROMPTS), *(decoder.step(tokens).clone() for tokens in steps)]
    for row, prompt in enumerate(PROMPTS):
        whole = token_losses(model, torch.tensor([prompt + steps[:, row].tolist()]), None)[0]
        assert (
            torch.stack([x[row] for x in logits]) - whole[len(prompt) - 1 :]
        ).abs().max() < 1e-4 * whole.abs().max()


@torch.no_grad()
def test_recomputed_scores_select_the_same_keys(model):
    """Scores of a step come from other matrix shapes than those of a whole forward: how many selections differ."""
    tokens = torch.randint(0, 512, (1, LONGEST), generator=torch.Generator().manual_seed(1))
    recorded = {}

    def record(name):
        def hook(module, inputs, scores):
            recorded.setdefault(name, []).append(scores)

        return hook

    scorers = [m for m in model.modules() if type(m).__name__ == "ScoringNetwork"]
    handles = [m.register_forward_hook(record(i)) for i, m in enumerate(scorers)]
    token_losses(model, tokens, None)
    decoder = ModelDecoder(model, batch_size=1, max_sequence_length=LONGEST)
    decoder.prefill([tokens[0, :20].tolist()])
    for token in tokens[0, 20:]:
        decoder.step(token[None])
    for handle in handles:
        handle.remove()
    different = total = 0
    for whole, *pieces in recorded.values():
        again = torch.cat(pieces, dim=1)
        assert (whole - again).abs().max() < 1e-4
        one, other = (select(x, topk=8, window=8, stride=4).evict for x in (whole, again))
        different, total = different + int((one != other).sum()), total + one.numel()
    assert total == 2 * 2 * LONGEST and different <= 1, f"{different} of {total} keys are evicted elsewhere"


def test_cache_bytes_do_not_depend_on_the_length(model):
    sizes = set()
    for longest, prompt in ((8, [1]), (LONGEST, list(range(60)))):
        decoder = ModelDecoder(model, batch_size=1, max_sequence_length=longest)
        decoder.prefill([prompt])
        sizes.add(decoder.cache_bytes)
    assert len(sizes) == 1


def test_what_does_not_fit_is_refused_and_the_decoder_stays_usable(model):
    decoder = ModelDecoder(model, batch_size=2, max_sequence_length=6)
    with pytest.raises(ValueError, match=r"step\(\) before prefill\(\)"):
        decoder.step(torch.tensor([1, 2]))
    expected = decoder.prefill([[1, 2], [3]])
    for prompts, message in (
        ([[1]], "1 prompts for a batch of 2"),
        ([[1], []], "prompt 1 is empty"),
        ([[1] * 7, [1]], "prompt 0 has 7 tokens, more than max_sequence_length=6"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.prefill(prompts)
    for _ in range(4):
        decoder.step(torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="already holds max_sequence_length=6 tokens"):
        decoder.step(torch.tensor([1, 1]))
    assert torch.equal(decoder.prefill([[1, 2], [3]]), expected)


def test_logits_that_are_not_finite_end_in_one_line_and_the_decoder_stays_usable(model):
    decoder = ModelDecoder(model, batch_size=2, max_sequence_length=LONGEST)
    expected = generate(decoder, [[1], [2]], max_new_tokens=4, vocab_size=512)
    weight = model.embedding.word_embeddings.weight
    kept = weight[2].clone()
    with torch.no_grad():
        weight[2] = float("nan")
        with pytest.raises(UserError, match=r"prompt [12]: the logits after [0-9]+ tokens are not finite"):
            generate(decoder, [[1], [2]], max_new_tokens=4, vocab_size=512)
        weight[2] = kept
    assert generate(decoder, [[1], [2]], max_new_tokens=4, vocab_size=512).tokens == expected.tokens


def test_a_row_ends_before_the_end_token_while_others_go_on(model):
    decoder = ModelDecoder(model, batch_size=4, max_sequence_length=LONGEST)
    free = generate(decoder, PROMPTS, max_new_tokens=20, vocab_size=512).tokens
    end = free[0][5]
    calls = []
    made = generate(
        decoder,
        PROMPTS,
        max_new_tokens=20,
        vocab_size=512,
        end=end,
        on_token=lambda *call: calls.append(call),
    )
    assert made.tokens == [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in free]
    for row, tokens in enumerate(made.tokens):
        assert [token for r, token in calls if r == row] == [*tokens, None]
