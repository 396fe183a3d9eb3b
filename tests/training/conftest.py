# SPDX-License-Identifier: Apache-2.0
"""A small corpus, its tokenizer and its datasets, made once; a model on them; and how a program refuses."""

import os

import pytest
import torch
from corpus import prepare_corpus
from programs import Prepared

from sparsek_megatron.errors import report_user_errors


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Prepared:
    return prepare_corpus(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def config(prepared, tmp_path_factory):
    """Settings of a run with a small model, which is not started."""
    from sparsek_megatron.training.arguments import parse

    folder = tmp_path_factory.mktemp("generate")
    config, _ = parse([*prepared.flags(folder), "--nproc-per-node", "1"])
    return config


@pytest.fixture(scope="module")
def machine(config):
    """Megatron's groups over this process alone; on top of the process group that other tests may have left."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from sparsek_megatron.cpu import enable_cpu
    from sparsek_megatron.training import parallel

    if torch.cuda.is_available():
        pytest.skip("these models are built on the CPU; tests/plugin/test_gpu_inference.py is for GPUs")
    if torch.distributed.is_initialized():
        enable_cpu()
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(config.seed)
        yield
        parallel_state.destroy_model_parallel()
        return
    before = dict(os.environ)
    parallel.initialize(config)
    yield
    parallel.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def model(config, machine, prepared):
    """A small model whose logits are far from uniform."""
    from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
    from sparsek_megatron.training.model import build_model

    torch.manual_seed(5)
    model = build_model(config, SentencePieceTokenizer.load(prepared.tokenizer).vocab_size, on_gpu=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return model.eval()


@pytest.fixture
def refused(capsys, monkeypatch):
    """Call a program's function and return its one-line report, requiring exit code 2 and nothing else said."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def call(program, *arguments) -> str:
        with pytest.raises(SystemExit) as exit_info, report_user_errors():
            program(*arguments)
        assert exit_info.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error.strip()

    return call
