# SPDX-License-Identifier: Apache-2.0
"""Generation through megatron-core's static inference contexts: the training forward's logits, in constant memory."""

import pytest
import static_engine
import torch
from mcore_harness import batch, build_gpt, parallel, tiny_config
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.module import Float16Module

from sparsek_megatron import SparseKConfig, get_sparsek_layer_spec
from sparsek_megatron.inference import SparseKInferenceContext, cache_bytes, layer_caches
from sparsek_megatron.inference_model import ModelDecoder

LENGTH = 90


@pytest.fixture(scope="module", autouse=True)
def one_process(request):
    if torch.cuda.is_available():
        pytest.skip("CPU test: test_gpu_inference.py is for GPUs")
    request.getfixturevalue("_process_group")
    with parallel(), torch.no_grad():
        yield


def model(**changes):
    torch.manual_seed(1)
    config = tiny_config(**changes.pop("config", {}))
    settings = SparseKConfig(**{"topk": 4, "window": 6, "stride": 8, **changes})
    return build_gpt(config, get_sparsek_layer_spec(config, sparsek=settings)).eval()


def forward(gpt, tokens, context, first=0):
    positions = torch.arange(first, first + tokens.shape[1]).expand_as(tokens)
    return gpt(tokens, positions, None, inference_context=context, runtime_gather_output=True)[:, -1:]


def generate(gpt, tokens, context, cuts):
    """Logits of the last token of each piece, pieces ending at `cuts`."""
    logits, start = [], 0
    for stop in cuts:
        logits.append(forward(gpt, tokens[:, start:stop], context, start))
        context.sequence_len_offset += stop - start
        start = stop
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("gate", ["key_value", "value", "logit"])
@pytest.mark.parametrize("stride", [1, 8])
def test_logits_are_those_of_the_training_forward(gate, stride):
    gpt = model(gate=gate, stride=stride)
    tokens, positions, _ = batch(LENGTH)
    whole = gpt(tokens, positions, None)
    context = StaticInferenceContext(2, LENGTH)
    cuts = [17, 30, *range(31, LENGTH + 1)]  # a prompt in two pieces, then one token at a time
    logits = generate(gpt, tokens, context, cuts)
    assert (logits - whole[:, [cut - 1 for cut in cuts]]).abs().max() < 1e-5


def test_memory_does_not_depend_on_the_context_and_no_dense_memory_is_made():
    gpt, sizes = model(), []
    for longest in (64, 4096):
        context = StaticInferenceContext(2, longest)
        generate(gpt, batch(40)[0], context, [30, 35, 40])
        assert context.key_value_memory_dict == {}
        sizes.append(cache_bytes(context))
    assert sizes[0] == sizes[1] > 0


def test_a_context_that_is_reset_starts_over():
    gpt = model()
    tokens, _, _ = batch(40)
    context = StaticInferenceContext(2, 64)
    first = generate(gpt, tokens, context, [20, 21, 22])
    context.reset()
    assert torch.equal(generate(gpt, tokens, context, [20, 21, 22]), first)


def test_rows_are_filled_where_the_context_says():
    gpt = model()
    tokens, positions, _ = batch(40, 3)
    whole = gpt(tokens, positions, None)
    context = StaticInferenceContext(3, 64)
    for first, last in ((2, 3), (0, 2)):
        context.reset()
        context.batch_size_offset = first
        logits = generate(gpt, tokens[first:last], context, [30, 31])
        assert (logits - whole[first:last, [29, 30]]).abs().max() < 1e-5
    assert layer_caches(context)[1].lengths.tolist() == [31, 31, 31]


def test_rows_of_different_lengths_step_together():
    gpt = model()
    tokens, positions, _ = batch(LENGTH, 3)
    whole = gpt(tokens, positions, None)
    lengths = [5, 40, 23]
    context = SparseKInferenceContext(3, LENGTH)
    for row, length in enumerate(lengths):
        context.reset()
        context.batch_size_offset = row
        forward(gpt, tokens[row : row + 1, :length], context)
    context.enable_decode_mode()
    for i in range(45):
        step = torch.stack([tokens[row, length + i] for row, length in enumerate(lengths)])[:, None]
        logits = forward(gpt, step, context)
        expected = torch.stack([whole[row, length + i] for row, length in enumerate(lengths)])
        assert (logits[:, 0] - expected).abs().max() < 1e-5


def test_what_a_constant_size_cache_cannot_do_is_refused_and_leaves_it_usable():
    gpt = model()
    tokens, _, _ = batch(40)
    context = StaticInferenceContext(2, 32)
    first = generate(gpt, tokens, context, [20, 21])
    context.sequence_len_offset = 15
    with pytest.raises(ValueError, match=r"sequence_len_offset=15, but these rows hold \[21, 21\] tokens"):
        forward(gpt, tokens[:, :1], context)
    context.sequence_len_offset = 21
    with pytest.raises(
        ValueError, match=r"21 \+ 19 tokens pass the inference context's max_sequence_length=32"
    ):
        forward(gpt, tokens[:, 21:40], context)
    with pytest.raises(ValueError, match=r"rows 0 ... 2 with an inference context of max_batch_size=2"):
        forward(gpt, batch(1, 3)[0], context)
    again = StaticInferenceContext(2, 32)
    expected = generate(gpt, tokens, again, [20, 21, 22])
    assert torch.equal(expected[:, :2], first)
    assert torch.equal(forward(gpt, tokens[:, 21:22], context, 21), expected[:, 2:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": 5, "pool": 16}, "topk=4 for layer 1, and this model has topk=5"),
        ({"stride": 16}, "stride=8 for layer 1, and this model has stride=16"),
        ({"gate": "value"}, "gate=key_value for layer 1, and this model has gate=value"),
        ({"config": {"kv_channels": 16}}, "head_dim=8 for layer 1, and this model has head_dim=16"),
        (
            {"config": {"params_dtype": torch.float16}},
            r"dtype=torch.float32 for layer 1, and this model has dtype=torch.float16",
        ),
    ],
)
def test_the_caches_of_another_model_are_refused_and_stay_usable(change, message):
    gpt, context = model(), StaticInferenceContext(2, 32)
    tokens, _, _ = batch(22)
    first = generate(gpt, tokens, context, [20, 21])
    with pytest.raises(ValueError, match=f"inference_context holds a cache of {message}: make a new context"):
        forward(model(**change), tokens[:, 21:], context, 21)
    expected = generate(gpt, tokens, StaticInferenceContext(2, 32), [20, 21, 22])
    assert torch.equal(torch.cat([first, forward(gpt, tokens[:, 21:], context, 21)], dim=1), expected)


def test_a_model_converted_to_bfloat16_gets_caches_of_its_weights_dtype():
    """Megatron's Float16Module converts a model whose params_dtype may have stayed fp32."""
    converted = Float16Module(tiny_config(bf16=True), model()).eval()
    tokens, positions, _ = batch(40)
    decoder = ModelDecoder(converted, batch_size=2, max_sequence_length=40)
    logits = [decoder.prefill(tokens[:, :30].tolist()), *(decoder.step(tokens[:, i]) for i in range(30, 40))]
    assert all(cache.settings.dtype == torch.bfloat16 for cache in layer_caches(decoder.context).values())
    whole = converted(tokens, positions, None)[:, 29:]
    assert (torch.stack(logits, dim=1) - whole).abs().max() < 0.05


def test_learned_positions_end_where_the_model_says():
    config = tiny_config()
    spec = get_sparsek_layer_spec(config, sparsek=SparseKConfig(topk=4, window=6, stride=8))
    gpt = build_gpt(config, spec, position_embedding_type="learned_absolute", max_sequence_length=40).eval()
    refused = "max_sequence_length=41: the model has learned positions for 40 tokens"
    with pytest.raises(ValueError, match=refused):
        ModelDecoder(gpt, batch_size=2, max_sequence_length=41)
    tokens, positions, _ = batch(40)
    whole = gpt(tokens, positions, None)
    decoder = ModelDecoder(gpt, batch_size=2, max_sequence_length=40)
    logits = [decoder.prefill(tokens[:, :30].tolist()), *(decoder.step(tokens[:, i]) for i in range(30, 40))]
    assert (torch.stack(logits, dim=1) - whole[:, 29:]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="a row already holds max_sequence_length=40 tokens"):
        decoder.step(tokens[:, 0])
    with pytest.raises(ValueError, match=refused):
        ModelDecoder(Float16Module(tiny_config(bf16=True), gpt), batch_size=2, max_sequence_length=41)


def test_models_with_dense_layers_step_rows_of_one_length_only():
    gpt = model(dense_layers=(0,))
    tokens, positions, _ = batch(30)
    whole = gpt(tokens, positions, None)
    logits = generate(gpt, tokens, StaticInferenceContext(2, 32), [28])
    assert (logits - whole[:, 27:28]).abs().max() < 1e-5
    with pytest.raises(NotImplementedError, match="layer 1 is dense: its memory has one length for all rows"):
        forward(gpt, tokens, SparseKInferenceContext(2, 32))


def test_contexts_and_modes_that_are_not_generation_are_refused():
    gpt = model()
    tokens, _, _ = batch(8)
    with pytest.raises(NotImplementedError, match=r"model in training mode: call model.eval\(\) first"):
        forward(gpt.train(), tokens, StaticInferenceContext(2, 32))
    attention = gpt.eval().decoder.layers[0].self_attention
    with pytest.raises(
        NotImplementedError, match="inference_context=Dynamic: dynamic batching bypasses core attention"
    ):
        attention(torch.randn(8, 2, 32), None, inference_context=type("Dynamic", (), {})())
    mask = torch.ones(1, 1, 3, 8, dtype=torch.bool).triu(1 + 5)
    context = StaticInferenceContext(2, 32)
    context.sequence_len_offset = 0
    attention(torch.randn(3, 2, 32), mask, inference_context=context)
    with pytest.raises(NotImplementedError, match="is not plain causal"):
        attention(torch.randn(3, 2, 32), ~mask, inference_context=context)


def test_fused_rope_cannot_rotate_rows_by_positions_of_their_own():
    gpt = model()
    context = SparseKInferenceContext(2, 32)
    forward(gpt, batch(8)[0], context)
    context.enable_decode_mode()
    gpt.config.apply_rope_fusion = True
    with pytest.raises(NotImplementedError, match="--no-rope-fusion"):
        forward(gpt, batch(1)[0], context)


class NoEvent:
    """A CUDA event where there is no CUDA."""

    def __init__(self, **_options):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, _other):
        return 1.0


def test_the_static_engine_of_megatron_generates_from_the_caches(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", NoEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)
    prompts = ["hello there", "how are you today, my friend?"]
    for prompt, tokens, logits in static_engine.generate(model(), prompts, tokens=30):
        assert len(prompt) in (11, 29) and len(tokens) > 5
        assert logits.argmax(-1).tolist() == tokens
