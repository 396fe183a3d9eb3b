# SPDX-License-Identifier: Apache-2.0
"""What SparseK attention does not do, refused by name: each check gives the flag and the alternative.

Raised at construction wherever the configuration shows it, since the alternative is a run that silently
trains dense attention, or attention over the wrong tokens.
"""

from __future__ import annotations

import weakref

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from sparsek_megatron import compat
from sparsek_megatron.context_parallel.attention import check_method


def check_model_config(config: TransformerConfig) -> None:
    """Refuse a model configuration that SparseK attention would not honour.

    Raises NotImplementedError naming the flag, its value and what to use.
    """
    refusals = (
        (
            config.attention_dropout > 0,
            f"--attention-dropout {config.attention_dropout}: SparseK attention has no dropout; use "
            "--attention-dropout 0 (attention_dropout=0.0; megatron-core's default is 0.1)",
        ),
        (
            getattr(config, "softmax_type", "vanilla") != "vanilla",
            f"--softmax-type {getattr(config, 'softmax_type', 'vanilla')}: use --softmax-type vanilla",
        ),
        (
            getattr(config, "qk_clip", False),
            "--qk-clip: SparseK attention does not report the maximum logit; use --qk-layernorm to bound "
            "logits",
        ),
        (
            config.multi_latent_attention,
            "--multi-latent-attention: SparseK selects keys per KV head, MLA has none; use grouped-query "
            "attention",
        ),
        (
            getattr(config, "experimental_attention_variant", None) is not None,
            f"--experimental-attention-variant {getattr(config, 'experimental_attention_variant', None)}: "
            "it replaces the core attention; leave it out",
        ),
        (
            config.flash_decode,
            "--flash-decode: it bypasses core attention and would decode densely; leave it out: a static inference "
            "context decodes from SparseK's cache of constant size",
        ),
        (
            getattr(config, "window_size", None) is not None,
            f"--window-size {getattr(config, 'window_size', None)}: SparseK has its own window; set "
            "SparseKConfig.window",
        ),
        (
            bool(config.fp8_dot_product_attention or config.fp8_multi_head_attention),
            "--fp8-dot-product-attention / --fp8-multi-head-attention: SparseK attention runs in bf16, "
            "fp16 or fp32; leave it out (FP8 linear layers keep working)",
        ),
        (
            config.normalization not in ("RMSNorm", "LayerNorm"),
            f"--normalization {config.normalization}: use RMSNorm or LayerNorm",
        ),
        (
            getattr(config, "hybrid_context_parallel", False),
            "--hybrid-context-parallel: SparseK attention takes one context-parallel size for all sequences; leave it "
            "out",
        ),
        (
            compat.attention_backend_overwrites(config),
            "--attention-backend local: megatron-core 0.19 then overwrites the core attention of any "
            "spec with dense attention; use --attention-backend auto",
        ),
    )
    for refused, message in refusals:
        if refused:
            raise NotImplementedError(message)
    check_context_parallel(config)


def check_context_parallel(config: TransformerConfig) -> None:
    """Refuse a `cp_comm_type` other than p2p and a2a, and a2a where a rank's KV heads do not divide.

    Raises NotImplementedError naming the flag, its value and what to use.
    """
    cp, tp, groups = (
        config.context_parallel_size,
        config.tensor_model_parallel_size,
        config.num_query_groups or config.num_attention_heads,
    )
    kinds = getattr(config, "cp_comm_type", None)
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if cp > 1 and check_method(kind) == "a2a" and max(groups // tp, 1) % cp:
            raise NotImplementedError(
                f"--cp-comm-type a2a: {max(groups // tp, 1)} KV heads on a tensor-parallel rank do not divide by "
                f"--context-parallel-size {cp}; use --cp-comm-type p2p"
            )


def check_every_layer_has_experts(config: TransformerConfig) -> None:
    """Refuse a `moe_layer_freq` that leaves some layers dense, where one layer's spec is to serve them all.

    Raises NotImplementedError naming the flag, its value and what to use.
    """
    frequency = config.moe_layer_freq
    all_layers = frequency == 1 if isinstance(frequency, int) else all(frequency)
    if config.num_moe_experts is not None and not all_layers:
        raise NotImplementedError(
            f"--moe-layer-freq {frequency}: one layer spec cannot have dense and MoE layers; use "
            "get_sparsek_block_spec(config), which follows it"
        )


def check_training_arguments(args: object) -> None:
    """Refuse flags of Megatron-LM's training script that the model's configuration does not carry.

    `args` is `megatron.training.get_args()`. Raises NotImplementedError naming the flag and what to use,
    ValueError for a sequence length that sequence parallelism cannot split.
    """
    if getattr(args, "reset_attention_mask", False) and not getattr(args, "sft", False):
        raise NotImplementedError(
            "--reset-attention-mask: the mask does not reach SparseK attention and documents would see "
            "each other; leave it out, or pass document boundaries as packed_seq_params (cu_seqlens)"
        )
    graphs = compat.cuda_graph_implementation(args)
    if graphs != "none" and getattr(args, "create_attention_mask_in_dataloader", False):
        raise NotImplementedError(
            f"--cuda-graph-impl {graphs} with attention masks from the data loader: a replay cannot look at "
            "them; use --no-create-attention-mask-in-dataloader"
        )
    chunks = 2 * getattr(args, "context_parallel_size", 1)
    length = getattr(args, "seq_length", None) or chunks
    if chunks > 2 and length % chunks:
        raise ValueError(
            f"--seq-length {length} is not divisible by 2 x --context-parallel-size = {chunks}: pad it to "
            f"{-(-length // chunks) * chunks}"
        )
    tp = getattr(args, "tensor_model_parallel_size", 1)
    if getattr(args, "sequence_parallel", False) and getattr(args, "seq_length", tp) % tp:
        raise ValueError(
            f"--seq-length {getattr(args, 'seq_length', None)} is not a multiple of "
            f"--tensor-model-parallel-size {tp}, which --sequence-parallel needs: pad the length or leave "
            "--sequence-parallel out"
        )
    if getattr(args, "use_torch_fsdp2", False):
        raise NotImplementedError(
            "--use-torch-fsdp2: not supported; use --use-distributed-optimizer, or DeepSpeed ZeRO "
            "through examples/pretrain_gpt.py"
        )
    if getattr(args, "use_megatron_fsdp", False):
        raise NotImplementedError(
            "--use-megatron-fsdp: not supported; use --use-distributed-optimizer, or DeepSpeed ZeRO "
            "through examples/pretrain_gpt.py"
        )


def check_running_script() -> None:
    """`check_training_arguments` on Megatron-LM's parsed arguments, where its script runs this process."""
    arguments = compat.running_script_arguments()
    if arguments is not None:
        check_training_arguments(arguments)


def check_mask_type(attn_mask_type: AttnMaskType | None, *, packed: bool) -> None:
    """Refuse a mask type other than causal (padding_causal counts as causal where sequences are packed)."""
    allowed = [None, AttnMaskType.causal] + [AttnMaskType.padding_causal] * packed
    if attn_mask_type not in allowed:
        raise NotImplementedError(
            f"attn_mask_type={attn_mask_type}: SparseK attention is causal; use AttnMaskType.causal, with "
            "packed_seq_params for padded batches"
        )


_last_causal_mask: tuple[weakref.ref[Tensor], int] | None = None


def check_attention_mask(mask: Tensor | None, *, continued: bool = False) -> None:
    """Refuse an explicit mask that is not plain causal: SparseK attention would not apply it.

    mask [..., s, s] bool, True where attention is masked out, as Megatron's datasets build it. The check
    reads the whole mask, once per tensor; `--no-create-attention-mask-in-dataloader` saves both. While a CUDA
    graph is captured nothing can be read: the mask there is one that a warm-up iteration showed. continued: the
    queries are the last of the keys, as in generation, and the mask [..., s, keys] may be wider than high.
    """
    global _last_causal_mask
    if mask is None or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if _last_causal_mask is not None:
        known, version = _last_causal_mask
        if known() is mask and version == mask._version:
            return
    rows, columns = mask.shape[-2:]
    masked_out = mask if mask.dtype == torch.bool else mask > 0.5
    causal = torch.ones(rows, columns, dtype=torch.bool, device=mask.device).triu(1 + columns - rows)
    if rows > columns or (rows < columns and not continued) or not bool((masked_out == causal).all()):
        raise NotImplementedError(
            f"attention_mask {tuple(mask.shape)} is not plain causal, and SparseK attention would not "
            "apply it: use --no-create-attention-mask-in-dataloader, and packed_seq_params (cu_seqlens) "
            "for document boundaries"
        )
    _last_causal_mask = (weakref.ref(mask), mask._version)


def check_inference(
    inference_context: object | None, *, training: bool, packed: bool, context_parallel_size: int = 1
) -> None:
    """Refuse an inference context other than a static one, and one in a call that is not generation."""
    if inference_context is None:
        return
    if not isinstance(inference_context, StaticInferenceContext):
        raise NotImplementedError(
            f"inference_context={type(inference_context).__name__}: dynamic batching bypasses core attention and would "
            "run dense attention over a growing cache; use StaticInferenceContext (StaticInferenceEngine with "
            "legacy=True) or examples/generate.py"
        )
    if training:
        raise NotImplementedError("inference_context with a model in training mode: call model.eval() first")
    if context_parallel_size > 1:
        raise NotImplementedError(
            f"inference_context with --context-parallel-size {context_parallel_size}: every cache would hold other "
            "tokens; generate with context_parallel_size=1, whose memory does not grow with the context"
        )
    if packed:
        raise NotImplementedError(
            "packed_seq_params with an inference_context: give each sequence a row of the batch"
        )


def check_rotary_rows(config: TransformerConfig, positions: Tensor) -> None:
    """Refuse fused RoPE, which takes one position per token, where every row has its own (positions [b, 1])."""
    if positions.dim() == 2 and config.apply_rope_fusion:
        raise NotImplementedError(
            "--apply-rope-fusion: it rotates all rows by the same positions, and here each row has its own; use "
            "--no-rope-fusion (apply_rope_fusion=False)"
        )
