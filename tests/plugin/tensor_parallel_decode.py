# SPDX-License-Identifier: Apache-2.0
"""Generation on tensor-parallel GPUs, for torchrun: two decoders of one model, and the training forward.

Rank 0 prints what it found as JSON.
"""

from __future__ import annotations

import json

import torch
from mcore_harness import VOCAB, build_gpt, parallel, start_process_group, tiny_config

from sparsek_megatron import SparseKConfig, get_sparsek_layer_spec
from sparsek_megatron.inference_model import ModelDecoder

PROMPTS = [list(range(40)), [3], [7, 8] * 60, list(range(90, 0, -1))]
STEPS = 80


@torch.no_grad()
def main() -> None:
    start_process_group()
    with parallel(tp=torch.distributed.get_world_size()):
        config = tiny_config(
            hidden_size=256,
            kv_channels=64,
            use_cpu_initialization=False,
            bf16=True,
            params_dtype=torch.bfloat16,
        )
        spec = get_sparsek_layer_spec(
            config, sparsek=SparseKConfig(topk=32, window=32, stride=16), transformer_impl="local"
        )
        model = build_gpt(config, spec, parallel_output=False).cuda().eval()
        eager, graph = (
            ModelDecoder(model, batch_size=4, max_sequence_length=320, prefill_tokens=64, cuda_graph=captured)
            for captured in (False, True)
        )
        generator = torch.Generator().manual_seed(3)
        steps = torch.randint(0, VOCAB, (STEPS, 4), generator=generator).cuda()
        same, found = True, []
        for _ in range(2):
            pairs = [(eager.prefill(PROMPTS), graph.prefill(PROMPTS))]
            pairs += [(eager.step(tokens).clone(), graph.step(tokens).clone()) for tokens in steps]
            same &= all(torch.equal(one, other) for one, other in pairs)
            found = [pair[1] for pair in pairs]
        errors = []
        for row, prompt in enumerate(PROMPTS):
            tokens = torch.tensor([prompt + steps[:, row].tolist()]).cuda()
            positions = torch.arange(tokens.shape[1], device="cuda")[None]
            whole = model(tokens, positions, None)[0, len(prompt) - 1 :].float()
            ours = torch.stack([logits[row] for logits in found])
            errors.append(((ours - whole).norm() / whole.norm()).item())
        report = {"captured": graph._graph is not None, "same_bits": same, "errors": errors}
        if torch.distributed.get_rank() == 0:
            print(json.dumps(report), flush=True)
    torch.cuda.synchronize()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
