# SPDX-License-Identifier: Apache-2.0
"""Training steps of the benchmark's megatron-core trainer on one GPU, kernel by kernel and with a CUDA graph.

Prints one JSON line: each run's losses (as hexadecimal), then a digest of its last gradients and its weights.
A program of its own, since the stream and the random states of captures stay for the whole process.
Arguments: the folder of the examples, and one of WAYS.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, sys.argv[1])

from training_benchmark.graph import prepare_captures
from training_benchmark.model import Options, build, training_config
from training_benchmark.shapes import Shape
from training_benchmark.trainers import build_trainer

from sparsek_megatron import SparseKConfig
from sparsek_megatron.training import parallel
from sparsek_megatron.training.parallel import Machine

SHAPE = Shape(2, 256, 512, 4, 2, 64)
SPARSEK = SparseKConfig(topk=64, window=64, stride=16, overflow_warning=None, reference_length=1024)
TOKENS, VOCABULARY, WARMUP, STEPS = 1024, 512, 2, 3
WAYS = {
    "fused": Options(apply_rope_fusion=True),
    "saving": Options(recompute="full", cpu_offloading_num_layers=1, mlp_tile_tokens=256),
}


def batches(seed: int, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """New tokens at every step, each the last one plus the sequence's own number."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        first, pace = torch.randint(1, VOCABULARY, (2, 1, 1), generator=generator)
        ids = ((first + pace * torch.arange(tokens + 1)) % VOCABULARY).cuda()
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def train(options: Options, machine: Machine, *, captured: bool) -> list[str]:
    """Steps of one length and a step of another, each length warmed up before it is captured, from the same weights."""
    config = training_config(SHAPE, SPARSEK, tokens=TOKENS, layout=(1, 1), options=options)
    prepare_captures(config.seed)
    torch.manual_seed(1)
    model = build("sparsek", config, SPARSEK, vocabulary=VOCABULARY, machine=machine, options=options)
    trainer: Any = build_trainer("mcore", config, model, machine)
    found = []
    for tokens, steps in ((TOKENS, STEPS), (TOKENS // 2, 1)):
        data = batches(5, tokens)
        for _ in range(WARMUP):
            trainer.step(*next(data))
        if captured:
            trainer.gradients.capture(*next(batches(6, tokens)))
        found += [float(trainer.step(*next(data))).hex() for _ in range(steps)]
        trainer.gradients.release()
    digest = hashlib.sha256()
    for parameter in model.parameters():
        for tensor in (parameter.detach(), parameter.main_grad):
            digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return [*found, digest.hexdigest()]


def main(way: str) -> None:
    config = training_config(SHAPE, SPARSEK, tokens=TOKENS, layout=(1, 1), options=Options())
    machine = parallel.initialize(config)
    found = {}
    # The first run compiles, for the second length with variable sizes: only those after it have all kernels in common.
    for name, captured in (("compiling", False), ("eager", False), ("again", False), ("captured", True)):
        found[name] = train(WAYS[way], machine, captured=captured)
        gc.collect()
    print(json.dumps(found), flush=True)
    parallel.shutdown()


if __name__ == "__main__":
    main(sys.argv[2])
