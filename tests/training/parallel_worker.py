# SPDX-License-Identifier: Apache-2.0
"""One rank of the layouts that `test_parallel_training` compares: prints each layout's losses and gradient norms."""

import json
import os
import sys
from pathlib import Path

import torch

from sparsek_megatron.data.datasets import build_datasets
from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.training import parallel
from sparsek_megatron.training.arguments import parse
from sparsek_megatron.training.checkpoint import load
from sparsek_megatron.training.engine import build_engine
from sparsek_megatron.training.loop import Trainer
from sparsek_megatron.training.model import build_model
from sparsek_megatron.training.validate import data_paths


class Recorder:
    """A report that keeps the numbers."""

    def __init__(self):
        self.records = []

    def step(self, **record):
        self.records.append([record["loss"], record["grad_norm"]])

    def validation(self, **record):
        self.records.append([record["loss"], 0.0])

    def line(self, text):
        pass

    def resume_clock(self):
        pass


def trajectory(argv: list[str], *, resume_at: int | None = None) -> list[list[float]]:
    """Losses and gradient norms of a run; with `resume_at`, its engine is rebuilt from that checkpoint midway."""
    config, _ = parse(argv)
    machine = parallel.initialize(config)
    tokenizer = SentencePieceTokenizer.load(config.tokenizer_model)
    recorder = Recorder()
    train_set, valid_set = build_datasets(
        data_paths(config), tokenizer, sequence_length=config.seq_length,
        train_samples=config.train_iters * config.global_batch_size,
        valid_samples=config.eval_iters * config.global_batch_size, seed=config.seed, cache=Path(config.save),
    )  # fmt: skip

    def trainer() -> Trainer:
        torch.manual_seed(config.seed)
        engine, _ = build_engine(config, build_model(config, tokenizer.vocab_size, on_gpu=False), machine)
        return Trainer(
            config, engine, machine, train_set=train_set, valid_set=valid_set, tokenizer_sha256=tokenizer.sha256,
            report=recorder,
        )  # fmt: skip

    first = trainer()
    first.train(0)
    if resume_at is not None:
        recorder.records.append("resumed")
        again = trainer()
        load(again.engine, config, machine, step=resume_at)
        again.train(resume_at)
    parallel.shutdown()
    return recorder.records


if __name__ == "__main__":
    results = {name: trajectory(**case) for name, case in json.loads(sys.argv[1]).items()}
    if os.environ.get("RANK", "0") == "0":
        print("RESULTS " + json.dumps(results))
