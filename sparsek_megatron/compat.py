# SPDX-License-Identifier: Apache-2.0
"""Everything that depends on the version of megatron-core or on an optional package. No other file asks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import sys
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.package_info import __version__ as MCORE_VERSION
from megatron.core.transformer import torch_norm, transformer_block
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

MINIMUM_MCORE = (0, 16, 1)
FIRST_UNSUPPORTED_MCORE = (0, 20, 0)


def version_tuple(version: str) -> tuple[int, ...]:
    """Numeric part of a version: "0.19.2" and "0.19.2rc1" give (0, 19, 2)."""
    numbers = []
    for part in version.split(".")[:3]:
        digits = "".join(c for i, c in enumerate(part) if part[: i + 1].isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


def require_supported_mcore() -> None:
    """Raises ImportError where the installed megatron-core is outside the supported range."""
    found = version_tuple(MCORE_VERSION)
    if not MINIMUM_MCORE <= found < FIRST_UNSUPPORTED_MCORE:
        raise ImportError(
            f"megatron-core {MCORE_VERSION} is not supported: install megatron-core>=0.16.1,<0.20 (0.16.1 "
            "is the newest for Python 3.11, 0.19 needs Python 3.12)"
        )


def have_transformer_engine() -> bool:
    """Whether megatron-core found Transformer Engine."""
    return bool(transformer_block.HAVE_TE)


def apex_fused_norms() -> tuple[Any, Any] | None:
    """Apex's (fused_rms_norm_affine, fused_layer_norm_affine), or None where NVIDIA Apex is not installed.

    The PyPI package called `apex` is another project, so the module is looked up by its full name.
    """
    if not torch.cuda.is_available():
        return None
    try:
        if importlib.util.find_spec("apex.normalization.fused_layer_norm") is None:
            return None
        from apex.normalization.fused_layer_norm import (  # pyright: ignore[reportMissingImports]
            fused_layer_norm_affine,
            fused_rms_norm_affine,
        )
    except ImportError:
        return None
    return fused_rms_norm_affine, fused_layer_norm_affine


FINAL_NORM = "final_layernorm"


def let_layer_specs_name_the_final_norm() -> None:
    """Make `TransformerBlock` take the final norm from a bare layer spec's `metainfo[FINAL_NORM]`, where it has one.

    megatron-core gives every model made from a single `ModuleSpec` the same final norm, a module global: without TE
    or Apex `WrappedTorchNorm`, which asserts against sequence parallelism, and with Apex alone `FusedLayerNorm`, which
    asserts against RMSNorm. The function that picks it is wrapped; for a spec without the entry, a stock dense one for
    example, the answer is megatron-core's own. Calling it again changes nothing.
    """
    stock = transformer_block._get_block_submodules
    if getattr(stock, "reads_metainfo", False):
        return

    @functools.wraps(stock)
    def with_final_norm(config: Any, spec: Any, *args: Any, **keywords: Any) -> Any:
        block = stock(config, spec, *args, **keywords)
        norm = getattr(spec, "metainfo", {}).get(FINAL_NORM)
        return block if norm is None else dataclasses.replace(block, layer_norm=norm)

    with_final_norm.reads_metainfo = True  # pyright: ignore[reportAttributeAccessIssue]
    transformer_block._get_block_submodules = with_final_norm


def running_script_arguments() -> Any:
    """Megatron-LM's parsed arguments where one of its scripts runs this process, else None."""
    return getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)


def attention_backend_overwrites(config: Any) -> bool:
    """Whether `config.attention_backend` ("local", from 0.17) makes megatron-core replace a core attention."""
    backend = getattr(getattr(config, "attention_backend", None), "name", None)
    return backend == "local" and version_tuple(MCORE_VERSION) >= (0, 17, 0)


def cuda_graph_implementation(settings: Any) -> str:
    """What a configuration or Megatron-LM's arguments ask for: "none", "local", "full_iteration", ...

    Both of 0.16's older flags included (`--enable-cuda-graph`, `--external-cuda-graph`).
    """
    if getattr(settings, "external_cuda_graph", False):
        return "transformer_engine"
    named = getattr(settings, "cuda_graph_impl", None) or "none"
    return "local" if named == "none" and getattr(settings, "enable_cuda_graph", False) else named


def context_parallel_group(config: Any, pg_collection: Any = None) -> Any:
    """The context-parallel process group that a module was given, else Megatron's global one; None without CP."""
    if config.context_parallel_size <= 1:
        return None
    group = getattr(pg_collection, "cp", None)
    return parallel_state.get_context_parallel_group() if group is None else group


def stage_layer_indices(config: Any, *, vp_stage: int | None, pp_rank: int | None) -> list[int]:
    """Global indices (from 0) of the decoder layers that this pipeline stage builds, for any layout."""
    if config.pipeline_model_parallel_layout is not None:
        return config.pipeline_model_parallel_layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
        )
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    count = transformer_block.get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return list(range(first, first + count))


def save_layers_under_their_own_keys(config: Any) -> None:
    """Make distributed checkpoints name each layer, which a model of unlike layers needs.

    megatron-core otherwise stacks a parameter of all layers into one tensor, and a model whose dense layers have no
    scorer could not be saved. (The spelling of the setting is megatron-core's.)
    """
    config.hetereogenous_dist_checkpoint = True


def stock_hybrid_stack_spec() -> Any:
    """megatron-core's `hybrid_stack_spec`. Raises NotImplementedError where the version has no `HybridModel`."""
    try:
        from megatron.core.models.hybrid.hybrid_layer_specs import (  # pyright: ignore[reportMissingImports]
            hybrid_stack_spec,
        )
    except ModuleNotFoundError:
        raise NotImplementedError(
            f"megatron-core {MCORE_VERSION} has no HybridModel: use GPTModel with get_sparsek_layer_spec, "
            "or megatron-core 0.19"
        ) from None
    return hybrid_stack_spec


def mtp_layers_numbered_from_one() -> bool:
    """Whether multi-token prediction layers get layer numbers 1, 2, ... and not ones past the decoder's."""
    return version_tuple(MCORE_VERSION) >= (0, 17, 0)


def transformer_engine_norm() -> Any:
    """megatron-core's norm over Transformer Engine."""
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def inference_mode() -> contextlib.AbstractContextManager[None]:
    """Where a model called inside knows that it generates, and returns the logits of the last token only.

    0.19 asks a process-wide flag; earlier versions go by the inference context.
    """
    try:
        from megatron.core.inference.utils import InferenceMode  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        return contextlib.nullcontext()
    return InferenceMode.active()


def is_plain_norm(slot: Any) -> bool:
    """Whether a q_layernorm/k_layernorm slot of a stock local spec holds a norm that `QKNorm` replaces."""
    return slot is torch_norm.WrappedTorchNorm or getattr(slot, "__name__", "") == "FusedLayerNorm"


require_supported_mcore()
