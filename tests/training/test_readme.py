# SPDX-License-Identifier: Apache-2.0
"""What the README shows can be typed as it stands."""

import re
import shlex

from programs import REPOSITORY, finish, start_code

from sparsek_megatron.data.prepare import build_parser as prepare_parser
from sparsek_megatron.training.arguments import parse

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

CPU_MODEL = """
from sparsek_megatron.cpu import enable_cpu
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig

enable_cpu()
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
config = TransformerConfig(
    num_layers=1, hidden_size=32, num_attention_heads=2, attention_dropout=0.0, use_cpu_initialization=True
)
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_commands_name_existing_programs_and_flags(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    seen = set()
    for first, *rest in commands():
        program, arguments = (rest[0], rest[1:]) if first == "python" else (first, rest)
        assert (REPOSITORY / program).is_file(), program
        seen.add(program)
        if program.endswith("prepare_data.py"):
            prepare_parser().parse_args(arguments)
        if program.endswith("pretrain_gpt.py"):
            parse(arguments)
    assert {"./launch/quickstart.sh", "./launch/test.sh", "examples/pretrain_gpt.py"} <= seen


def test_the_python_lines_build_a_model():
    (lines,) = blocks("python")
    assert len([line for line in lines.splitlines() if line]) <= 6
    said = finish(start_code("import torch\n" + CPU_MODEL + lines + "\nprint(type(model).__name__, 'built')"))
    assert "GPTModel built" in said and "core_attention=SparseKCoreAttention" in said
