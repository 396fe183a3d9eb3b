# SPDX-License-Identifier: Apache-2.0
"""What would silently train something else is refused by name."""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import pytest
import te_stubs
import torch
from mcore_harness import batch, build_gpt, packed, tiny_config
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.transformer_config import MLATransformerConfig

from sparsek_megatron import (
    SparseKConfig,
    SparseKCoreAttention,
    compat,
    get_sparsek_block_spec,
    get_sparsek_layer_spec,
    sparsek_layer_spec,
)

pytestmark = pytest.mark.usefixtures("megatron")

SPARSEK = SparseKConfig(topk=4, window=4, stride=4)

REFUSED = [
    ({"attention_dropout": 0.1}, "--attention-dropout 0"),
    ({"softmax_type": "learnable"}, "--softmax-type vanilla"),
    ({"softmax_type": "off-by-one"}, "--softmax-type vanilla"),
    ({"qk_clip": True}, "--qk-clip"),
    ({"flash_decode": True}, "--flash-decode"),
    ({"window_size": (128, 0)}, "SparseKConfig.window"),
    ({"fp8_dot_product_attention": True}, "--fp8-dot-product-attention"),
    ({"normalization": "L2Norm"}, "--normalization L2Norm"),
    ({"hybrid_context_parallel": True}, "--hybrid-context-parallel"),
    ({"cp_comm_type": "a2a+p2p", "context_parallel_size": 2}, "--cp-comm-type a2a+p2p: use p2p"),
    (
        {"cp_comm_type": ["p2p", "all_gather"], "context_parallel_size": 2},
        "--cp-comm-type all_gather: use p2p",
    ),
    (
        {"cp_comm_type": "a2a", "context_parallel_size": 4},
        "2 KV heads on a tensor-parallel rank do not divide by",
    ),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[next(iter(c)) for c, _ in REFUSED])
def test_unsupported_model_settings_are_refused_by_every_entry(changes: dict[str, Any], words: str) -> None:
    config = tiny_config()
    for name, value in changes.items():
        setattr(config, name, value)
    entries = [
        lambda: get_sparsek_layer_spec(config, sparsek=SPARSEK),
        lambda: get_sparsek_block_spec(config, sparsek=SPARSEK),
        lambda: build_gpt(config, sparsek_layer_spec),
        lambda: build_gpt(config, get_sparsek_layer_spec(sparsek=SPARSEK)),
        lambda: SparseKCoreAttention(config, 1, AttnMaskType.causal, "self", sparsek=SPARSEK),
    ]
    for entry in entries:
        with pytest.raises(NotImplementedError) as error:
            entry()
        assert words in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"), [("fp8", "hybrid"), ("tp_comm_overlap", True), ("cuda_graph_impl", "local")]
)
def test_settings_of_the_layers_around_attention_are_not_refused(
    name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP8 linear layers and communication overlap are Transformer Engine's business; the attention stays in bf16."""
    te_stubs.install(monkeypatch)
    config = tiny_config()
    setattr(config, name, value)
    spec = get_sparsek_layer_spec(config, sparsek=SPARSEK)
    assert (
        spec.submodules.self_attention.submodules.linear_qkv is te_stubs.StubTELayerNormColumnParallelLinear
    )
    SparseKCoreAttention(config, 1, AttnMaskType.causal, "self", sparsek=SPARSEK)


def test_multi_latent_attention_is_refused() -> None:
    config = MLATransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    with pytest.raises(NotImplementedError, match="--multi-latent-attention"):
        get_sparsek_layer_spec(config, sparsek=SPARSEK)


def test_the_local_attention_backend_is_refused_where_it_overwrites_core_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config()
    config.attention_backend = AttnBackend.local
    monkeypatch.setattr(compat, "MCORE_VERSION", "0.19.2")
    with pytest.raises(NotImplementedError, match="--attention-backend local"):
        get_sparsek_layer_spec(config, sparsek=SPARSEK)
    monkeypatch.setattr(compat, "MCORE_VERSION", "0.16.1")
    get_sparsek_layer_spec(config, sparsek=SPARSEK)


@pytest.mark.parametrize("mask_type", [AttnMaskType.padding, AttnMaskType.no_mask, AttnMaskType.arbitrary])
def test_non_causal_mask_types_are_refused(mask_type: AttnMaskType) -> None:
    with pytest.raises(NotImplementedError, match=r"AttnMaskType\.causal"):
        SparseKCoreAttention(tiny_config(), 1, mask_type, "self", sparsek=SPARSEK)
    core = SparseKCoreAttention(tiny_config(), 1, AttnMaskType.causal, "self", sparsek=SPARSEK)
    q = torch.randn(8, 1, 4, 8)
    with pytest.raises(NotImplementedError, match=r"AttnMaskType\.causal"):
        core(q, q[:, :, :2], q[:, :, :2], None, attn_mask_type=mask_type, attention_bias=torch.randn(1, 8, 2))


def test_cross_attention_and_missing_scores_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="attention_type='cross'"):
        SparseKCoreAttention(tiny_config(), 1, AttnMaskType.causal, "cross", sparsek=SPARSEK)
    core = SparseKCoreAttention(tiny_config(), 1, AttnMaskType.causal, "self", sparsek=SPARSEK)
    q = torch.randn(8, 1, 4, 8)
    with pytest.raises(ValueError, match="attention_bias is None"):
        core(q, q[:, :, :2], q[:, :, :2], None)


def model() -> Any:
    config = tiny_config()
    return build_gpt(config, get_sparsek_layer_spec(config, sparsek=SPARSEK))


def test_a_causal_mask_is_accepted_and_any_other_is_refused() -> None:
    gpt = model()
    tokens, positions, _ = batch(16)
    causal = torch.ones(16, 16, dtype=torch.bool).triu(1)[None, None]
    torch.testing.assert_close(gpt(tokens, positions, causal), gpt(tokens, positions, None), rtol=0, atol=0)
    documents = causal.clone()
    documents[..., 8:, :8] = True
    with pytest.raises(NotImplementedError, match="--no-create-attention-mask-in-dataloader"):
        gpt(tokens, positions, documents)
    causal[..., 8:, :8] = True  # the accepted tensor, changed in place
    with pytest.raises(NotImplementedError, match="packed_seq_params"):
        gpt(tokens, positions, causal)


def test_an_attention_bias_is_refused() -> None:
    attention = model().decoder.layers[0].self_attention
    with pytest.raises(NotImplementedError, match="attention_bias"):
        attention(torch.randn(8, 1, 32), None, attention_bias=torch.zeros(1))


def test_inference_contexts_are_refused() -> None:
    attention = model().decoder.layers[0].self_attention
    for keywords in ({"inference_context": object()}, {"inference_params": object()}):
        with pytest.raises(NotImplementedError, match="inference_context"):
            attention(torch.randn(8, 1, 32), None, **keywords)


def test_packed_sequences_must_be_thd_with_one_set_of_boundaries_that_fits_the_batch() -> None:
    gpt = model()
    tokens, positions, _ = batch(16, 1)
    params = packed([8, 8])
    params.qkv_format = "sbhd"
    with pytest.raises(NotImplementedError, match="'thd'"):
        gpt(tokens, positions, None, packed_seq_params=params)
    params = packed([8, 8])
    params.cu_seqlens_kv = params.cu_seqlens_kv[:-1]
    with pytest.raises(ValueError, match="2 query sequences against 1"):
        gpt(tokens, positions, None, packed_seq_params=params)
    with pytest.raises(ValueError, match="the last sequence ends at token 20 of 16"):
        gpt(tokens, positions, None, packed_seq_params=packed([8, 12]))
    tokens, positions, _ = batch(16, 2)
    with pytest.raises(
        ValueError, match=r"batch of 2 rows: pack all sequences into one \(--micro-batch-size 1\)"
    ):
        gpt(tokens, positions, None, packed_seq_params=packed([8, 8]))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"reset_attention_mask": True}, "--reset-attention-mask"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp"),
        (
            {"cuda_graph_impl": "local", "create_attention_mask_in_dataloader": True},
            "--cuda-graph-impl local",
        ),
        ({"enable_cuda_graph": True, "create_attention_mask_in_dataloader": True}, "--cuda-graph-impl local"),
        ({"external_cuda_graph": True, "create_attention_mask_in_dataloader": True}, "transformer_engine"),
        ({"sequence_parallel": True, "tensor_model_parallel_size": 4, "seq_length": 30}, "--seq-length 30"),
    ],
)
def test_flags_of_the_running_megatron_script_are_refused(
    flags: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As inside pretrain_gpt.py, where megatron.training holds the parsed arguments."""
    running = types.ModuleType("megatron.training.global_vars")
    running._GLOBAL_ARGS = types.SimpleNamespace(**flags)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", running)
    with pytest.raises((NotImplementedError, ValueError), match=words):
        model()
    for fine in (
        {"sequence_parallel": True},
        {"cuda_graph_impl": "local"},
        {"create_attention_mask_in_dataloader": True},
    ):
        running._GLOBAL_ARGS = types.SimpleNamespace(**fine)  # pyright: ignore
        model()


def test_unsupported_versions_of_megatron_core_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.15.0", "0.16.0", "0.20.0", "1.0"):
        monkeypatch.setattr(compat, "MCORE_VERSION", version)
        with pytest.raises(ImportError, match=version.replace(".", r"\.")):
            compat.require_supported_mcore()
    for version in ("0.16.1", "0.17.0rc1", "0.19.2"):
        monkeypatch.setattr(compat, "MCORE_VERSION", version)
        compat.require_supported_mcore()


def test_the_suite_runs_against_the_version_it_was_asked_for() -> None:
    """CI puts a second megatron-core on PYTHONPATH and names it here, so that a wrong path cannot pass unseen."""
    running = compat.MCORE_VERSION.partition("+")[0]  # in a git checkout 0.19 appends the checkout's commit
    assert os.environ.get("EXPECTED_MCORE_VERSION", running) == running
    compat.require_supported_mcore()
