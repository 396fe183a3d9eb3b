# SPDX-License-Identifier: Apache-2.0
"""One Megatron transformer layer with SparseK attention, forward and backward, on CPU or one GPU."""

import tempfile

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import build_module

from sparsek_megatron import SparseKConfig, get_sparsek_layer_spec
from sparsek_megatron.cpu import enable_cpu

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu":
    enable_cpu()
meeting = f"file://{tempfile.mkdtemp()}/ranks"
backend = "nccl" if device == "cuda" else "gloo"
torch.distributed.init_process_group(backend, init_method=meeting, rank=0, world_size=1)
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(0)
shape = {"num_layers": 1, "hidden_size": 512, "num_attention_heads": 8, "num_query_groups": 2}
precision = {"bf16": True, "params_dtype": torch.bfloat16, "use_cpu_initialization": device == "cpu"}
config = TransformerConfig(**shape, **precision, attention_dropout=0.0)
layer = build_module(get_sparsek_layer_spec(config, sparsek=SparseKConfig(topk=64, window=64)), config=config)
x = torch.randn(1024, 1, 512, dtype=torch.bfloat16, device=device, requires_grad=True)  # [s, b, h]
y, _ = layer.to(device)(x, attention_mask=None)
y.float().square().mean().backward()
print(f"output {tuple(y.shape)}, scorer gradient norm {layer.self_attention.scorer.weight.grad.norm():.2e}")
torch.distributed.destroy_process_group()
