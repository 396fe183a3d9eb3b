# SPDX-License-Identifier: Apache-2.0
"""The trainer's memory flags: refused where they cannot work, switched on where they can."""

import dataclasses

import pytest

from sparsek_megatron.errors import UserError
from sparsek_megatron.training import model as module
from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.validate import check_ranges

CONFIG = TrainingConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=64, train_iters=1, micro_batch_size=2
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"cpu_offloading_num_layers": 1},
            "--cpu-offloading-num-layers 1: .* add --recompute-granularity full",
        ),
        ({"cpu_offloading_num_layers": 3, "recompute_granularity": "full"}, "between 0 and --num-layers 2"),
        (
            {"cpu_offloading_num_layers": 2, "recompute_granularity": "full", "recompute_inputs": 2},
            "--recompute-inputs 2: must be between 0 and 1, half of the layers that --cpu-offloading-num-layers 2",
        ),
        ({"recompute_inputs": 1}, "--recompute-inputs 1: must be between 0 and 0, half of the layers"),
        ({"recompute_inputs": -1}, "--recompute-inputs -1: must be between 0 and 0"),
        (
            {"cpu_offloading_num_layers": 2, "recompute_granularity": "full", "recompute_inputs": 1}
            | {"recompute_method": "block", "recompute_num_layers": 1},
            "--recompute-inputs 1: must be between 0 and 0, .* and --recompute-num-layers 1 recomputes",
        ),
        (
            {"cpu_offloading_num_layers": 2, "recompute_granularity": "full", "recompute_inputs": 1}
            | {"recompute_num_layers": 2},
            "--recompute-inputs 1: needs a checkpoint a layer, and --recompute-num-layers is 2; use 1",
        ),
        ({"recompute_num_layers": 3}, "--recompute-num-layers 3: must be between 1 and --num-layers 2"),
        ({"num_layers": 3, "recompute_num_layers": 2}, "with --recompute-method uniform it must divide"),
        ({"mlp_tile_tokens": 0}, "--mlp-tile-tokens 0: must be at least 1"),
        ({"loss_chunk_tokens": -1}, "--loss-chunk-tokens -1"),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        check_ranges(dataclasses.replace(CONFIG, **settings))


@pytest.mark.parametrize(
    ("settings", "tokens", "vocabulary", "want"),
    [
        ({}, 1024, 1 << 17, []),
        ({}, 2048, 1 << 17, ["loss None"]),
        ({"tensor_model_parallel_size": 2}, 2048, 1 << 17, []),
        ({"loss_chunk_tokens": 0}, 2048, 1 << 17, []),
        ({"loss_chunk_tokens": 7, "mlp_tile_tokens": 9}, 64, 512, ["loss 7", "mlp 9"]),
        ({"recompute_granularity": "full", "cpu_offloading_num_layers": 2}, 64, 512, ["offload 2, 0"]),
        (
            {"recompute_granularity": "full", "cpu_offloading_num_layers": 2, "recompute_inputs": 1},
            64,
            512,
            ["offload 2, 1"],
        ),
        ({"recompute_granularity": None, "cpu_offloading_num_layers": 2}, 64, 512, []),
    ],
)
def test_each_flag_switches_its_part_on_and_large_logits_the_chunked_loss(
    monkeypatch, settings, tokens, vocabulary, want
):
    done = []
    monkeypatch.setattr(
        module, "use_chunked_loss", lambda _, chunk_tokens: done.append(f"loss {chunk_tokens}")
    )
    monkeypatch.setattr(module, "use_tiled_mlp", lambda _, tile_tokens: done.append(f"mlp {tile_tokens}"))
    monkeypatch.setattr(
        module,
        "use_checkpoint_offload",
        lambda _, num_layers, recompute_inputs: (
            done.append(f"offload {num_layers}, {recompute_inputs}") if num_layers else None
        ),
    )
    module.save_memory(None, dataclasses.replace(CONFIG, seq_length=tokens, **settings), vocabulary)  # pyright: ignore
    assert done == want


def test_block_recompute_reaches_the_model():
    settings = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
    megatron = module.transformer_config(dataclasses.replace(CONFIG, **settings), on_gpu=False)
    assert (megatron.recompute_method, megatron.recompute_num_layers) == ("block", 1)
