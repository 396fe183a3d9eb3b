# SPDX-License-Identifier: Apache-2.0
"""What a finished case of the training benchmark held is free for the next one, whose peak it would be counted in."""

import textwrap

from programs import REPOSITORY, finish, start_program

PROGRAM = """
import gc, sys, weakref
sys.path.insert(0, sys.argv[1])
from training_benchmark import runner
from training_benchmark.flags import build_parser

held, build = [], runner.build

def watched(*args, **kwargs):
    gc.collect()
    print("alive", sum(each() is not None for each in held), flush=True)
    model = build(*args, **kwargs)
    held.extend(weakref.ref(parameter) for parameter in model.parameters())
    return model

runner.build = watched
flags = ["--shape", "tiny", "--tokens", "64", "--topk", "8", "--window", "8", "--arms", "sparsek", "dense"]
flags += ["--trainers", "deepspeed", "--steps", "1", "--warmup", "1", "--out", sys.argv[2]]
runner.Benchmark(build_parser("").parse_args(flags)).run()
"""


def test_a_model_is_gone_before_the_next_is_built(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    printed = finish(start_program(str(program), str(REPOSITORY / "examples"), str(tmp_path)))
    assert [line for line in printed.splitlines() if line.startswith("alive")] == ["alive 0", "alive 0"]
