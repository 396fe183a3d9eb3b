# SPDX-License-Identifier: Apache-2.0
"""Tiny Megatron models on CPU, and their weights and gradients put together from tensor-parallel shards."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator
from typing import Any

import torch
from gloo_device import share_gloo_device
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils

from sparsek_megatron import SparseKConfig, get_sparsek_layer_spec
from sparsek_megatron.cpu import enable_cpu

VOCAB = 96
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def start_process_group() -> None:
    """gloo over the ranks that torchrun started, or over this process alone, patient enough for busy machines; NCCL
    where CUDA is available and torchrun started more than one.
    """
    on_gpu = torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        enable_cpu()
    torch.set_num_threads(1)
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 without Transformer Engine leaves the name undefined
    if torch.distributed.is_initialized():
        return
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    _layouts.clear()
    share_gloo_device()
    timeout = datetime.timedelta(seconds=120)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)


_layouts: dict[tuple[int, ...], dict[str, Any]] = {}


def _parallel_state_globals() -> dict[str, Any]:
    return {
        name: value for name, value in vars(parallel_state).items() if name.startswith("_") and name.isupper()
    }


@contextlib.contextmanager
def parallel(
    tp: int = 1, pp: int = 1, vpp: int | None = None, ep: int = 1, seed: int = 123, cp: int = 1
) -> Iterator[None]:
    """Megatron's process groups for these sizes, and the same seeds on all ranks.

    The groups of a layout are made once and put back on the next use: megatron-core makes dozens.
    """
    layout = (torch.distributed.get_world_size(), tp, pp, vpp or 0, ep, cp)
    if layout in _layouts:
        vars(parallel_state).update(_layouts[layout])
    else:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            expert_model_parallel_size=ep,
            context_parallel_size=cp,
        )
        _layouts[layout] = _parallel_state_globals()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def device() -> torch.device:
    """This rank's GPU, the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def tiny_config(**changes: Any) -> TransformerConfig:
    """Two layers of 4 query heads on 2 KV heads, RMSNorm and SwiGLU, no dropout."""
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "use_cpu_initialization": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "attention_softmax_in_fp32": True,
        "init_method_std": 0.2,
    }
    settings.update(changes)
    for size in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        settings.setdefault(size, getattr(parallel_state, f"get_{size.removesuffix('_size')}_world_size")())
    if settings["pipeline_model_parallel_size"] > 1:
        settings.setdefault("pipeline_dtype", settings.get("params_dtype", torch.float32))
    return TransformerConfig(**settings)


def build_gpt(config: TransformerConfig, spec: Any, **changes: Any) -> GPTModel:
    """GPT with RoPE over `spec`, untied embeddings, vocabulary of VOCAB."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "max_sequence_length": 256,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
    }
    settings.update(changes)
    return GPTModel(config, spec, **settings)


def build_small_gpt(**changes: Any) -> GPTModel:
    """Three layers of `tiny_config` with SparseK attention."""
    config = tiny_config(**{"num_layers": 3, **changes})
    sparsek = SparseKConfig(topk=32, window=32, stride=4, reference_length=64)
    return build_gpt(config, get_sparsek_layer_spec(config, sparsek=sparsek))


def batch(length: int = 64, size: int = 2, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens, positions and labels, all [size, length], the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (size, length), generator=generator)
    labels = torch.randint(0, VOCAB, (size, length), generator=generator)
    return tokens, torch.arange(length).expand(size, -1), labels


def packed(lengths: list[int], padded: list[int] | None = None) -> PackedSeqParams:
    """THD parameters of sequences of these lengths (and of these padded lengths)."""

    def boundaries(sizes: list[int]) -> torch.Tensor:
        return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)

    extra = {}
    if padded is not None:
        extra = {"cu_seqlens_q_padded": boundaries(padded), "cu_seqlens_kv_padded": boundaries(padded)}
    longest = max(padded or lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries(lengths),
        cu_seqlens_kv=boundaries(lengths),
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        **extra,
    )


def randomise(model: torch.nn.Module, seed: int = 11) -> None:
    """Norm weights and slopes away from their initial constants, the same on every rank, so that gradients
    differ.
    """
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += (0.3 * noise).to(parameter)


def _split_sizes(name: str, parameter: torch.nn.Parameter) -> tuple[int | None, int]:
    """(dimension sharded over TP or None, number of sub-parameters interleaved per rank)."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None, 1
    return parameter.partition_dim, 2 if "linear_fc1" in name else 1  # pyright: ignore


def unshard(
    name: str, parameter: torch.nn.Parameter, tensor: torch.Tensor, *, tolerance: float = 1e-9
) -> torch.Tensor:
    """The whole of `tensor` (a weight or gradient of `parameter`) from its tensor-parallel shards.

    A replicated one comes back as this rank has it, after a check that all ranks agree to `tolerance` relative.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    tp = group.size()
    shards = [torch.empty_like(tensor) for _ in range(tp)]
    torch.distributed.all_gather(shards, tensor.contiguous(), group=group)
    dimension, parts = _split_sizes(name, parameter)
    if dimension is None:
        scale = tensor.abs().max().clamp(min=1e-30)
        for shard in shards:
            if (shard - tensor).abs().max() > tolerance * scale:
                raise AssertionError(f"{name} is replicated but differs between tensor-parallel ranks")
        return tensor.clone()
    pieces = [shard.chunk(parts, dimension) for shard in shards]
    return torch.cat([torch.cat([p[part] for p in pieces], dimension) for part in range(parts)], dimension)


def full_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Whole weights by name."""
    return {name: unshard(name, p, p.data) for name, p in model.named_parameters()}


def full_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Whole gradients by name; a parameter without a gradient raises."""
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    if missing:
        raise AssertionError(f"no gradient for {missing}")
    return {name: unshard(name, p, p.grad) for name, p in model.named_parameters()}  # pyright: ignore


def shard_of(name: str, parameter: torch.nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """This rank's tensor-parallel shard of a whole weight."""
    group = parallel_state.get_tensor_model_parallel_group()
    dimension, parts = _split_sizes(name, parameter)
    if dimension is None:
        return whole
    pieces = [p.chunk(group.size(), dimension)[group.rank()] for p in whole.chunk(parts, dimension)]
    return torch.cat(pieces, dimension)


def load_full(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Give each parameter its shard of the whole weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(shard_of(name, parameter, weights[name]))


def loss_and_gradients(
    model: GPTModel, data: tuple[torch.Tensor, ...], packed_seq_params: PackedSeqParams | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean loss and whole gradients of one forward and backward."""
    tokens, positions, labels = data
    model.zero_grad()
    losses = model(tokens, positions, None, labels=labels, packed_seq_params=packed_seq_params)
    loss = losses.mean()
    loss.backward()
    return loss.detach(), full_gradients(model)


def relative_errors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """max |got - want| / max |want| for each name."""
    if got.keys() != want.keys():
        raise AssertionError(f"different parameters: {sorted(got.keys() ^ want.keys())}")
    return {
        name: float((got[name] - want[name]).abs().max() / want[name].abs().max().clamp(min=1e-30))
        for name in want
    }
