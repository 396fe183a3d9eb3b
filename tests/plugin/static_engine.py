# SPDX-License-Identifier: Apache-2.0
"""megatron-core's `StaticInferenceEngine` over a tiny model, on the versions' different constructors."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)


class Characters:
    """A tokenizer of single characters."""

    vocab_size, eod, bos = 96, 95, 0

    def tokenize(self, text: str) -> list[int]:
        return [ord(c) % 90 for c in text]

    def detokenize(self, ids: Any, **_options: Any) -> str:
        return " ".join(str(int(i)) for i in ids)


def wrap(model: Any, context: StaticInferenceContext) -> GPTInferenceWrapper:
    """The model as the engine wants it."""
    try:
        from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import (
            InferenceWrapperConfig,
        )
    except ImportError:  # 0.19
        return GPTInferenceWrapper(model, context)
    settings = InferenceWrapperConfig(
        hidden_size=model.config.hidden_size,
        params_dtype=model.config.params_dtype,
        inference_batch_times_seqlen_threshold=-1,
        padded_vocab_size=Characters.vocab_size,
        inference_max_requests=context.max_batch_size,
        inference_max_seq_length=context.max_sequence_length,
    )
    return GPTInferenceWrapper(model, settings, context)


def generate(
    model: Any, prompts: list[str], *, tokens: int
) -> list[tuple[list[int], list[int], torch.Tensor]]:
    """Per prompt: its ids, the greedy ids, and the logits [tokens, vocabulary] of the training forward for them.

    Fails where the model left a dense key/value memory in the context.
    """
    context = StaticInferenceContext(4, 320)
    controller = TextGenerationController(wrap(model, context), Characters())
    engine = StaticInferenceEngine(controller, max_batch_size=4, legacy=True)
    try:
        requests = engine.generate(
            prompts=prompts, sampling_params=SamplingParams(top_k=1, num_tokens_to_generate=tokens)
        )
    finally:
        try:  # 0.19's engine leaves the process in inference mode
            from megatron.core.inference.utils import InferenceMode

            InferenceMode.unset_active()
        except ImportError:
            pass
    assert context.key_value_memory_dict == {}
    device = next(model.parameters()).device
    found = []
    for request in requests:
        prompt, made = list(request.prompt_tokens), [int(t) for t in request.generated_tokens]
        whole = torch.tensor([prompt + made], device=device)
        with torch.no_grad():
            logits = model(whole, torch.arange(whole.shape[1], device=device)[None], None)[0].float()
        found.append((prompt, made, logits[len(prompt) - 1 : -1]))
    return found
