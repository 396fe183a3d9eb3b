# SPDX-License-Identifier: Apache-2.0
"""Generation of a whole model on one GPU: bfloat16, the Triton kernels, CUDA graphs, and megatron-core's own engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_gpu import gpt

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("megatron_on_cuda")]

HERE = Path(__file__).resolve().parent
PROMPTS = [list(range(40)), [3], [7, 8] * 60, list(range(90, 0, -1))]
LONGEST = 320


def decoder(model, **options):
    from sparsek_megatron.inference_model import ModelDecoder

    return ModelDecoder(model, batch_size=4, max_sequence_length=LONGEST, **options)


def sequence_logits(model, tokens):
    positions = torch.arange(len(tokens), device="cuda")[None]
    with torch.no_grad():
        return model(torch.tensor([tokens], device="cuda"), positions, None)[0].float()


def test_steps_replayed_as_a_graph_are_the_steps_run_one_by_one():
    model = gpt().eval()
    eager, graph = decoder(model, cuda_graph=False, prefill_tokens=64), decoder(model, prefill_tokens=64)
    for _ in range(2):  # the captured graph serves later prompts too
        assert torch.equal(eager.prefill(PROMPTS), graph.prefill(PROMPTS))
        steps = torch.randint(0, 96, (100, 4), device="cuda")
        for tokens in steps:
            assert torch.equal(eager.step(tokens), graph.step(tokens))
    assert graph._graph is not None and eager._graph is None


def test_logits_are_those_of_the_training_forward():
    model = gpt().eval()
    run = decoder(model, prefill_tokens=64)
    steps = torch.randint(0, 96, (100, 4), device="cuda")
    logits = torch.stack([run.prefill(PROMPTS), *(run.step(tokens).clone() for tokens in steps)], dim=1)
    for row, prompt in enumerate(PROMPTS):
        whole = sequence_logits(model, prompt + steps[:, row].tolist())[len(prompt) - 1 :]
        error = (logits[row] - whole).norm() / whole.norm()
        assert error < 2e-2, f"prompt {row}: {error:.2e}"


def test_the_static_engine_of_megatron_generates_from_the_caches():
    import static_engine

    prompts = ["hello there", "how are you today, my friend? " * 4]
    for _, tokens, logits in static_engine.generate(gpt().eval(), prompts, tokens=60):
        chosen = logits.gather(1, torch.tensor(tokens, device="cuda")[:, None]).squeeze(1)
        assert len(tokens) > 5
        assert (
            logits.max(1).values - chosen < 2e-2 * logits.abs().max()
        ).all()  # ties within bfloat16 may swap


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensor_parallel_ranks_generate_with_the_logits_of_the_training_forward():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*command, str(HERE / "tensor_parallel_decode.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    got = json.loads(done.stdout.strip().splitlines()[-1])
    assert got["same_bits"] and not got["captured"]  # capturing NCCL's calls has not been tried
    assert max(got["errors"]) < 2e-2, got["errors"]
