# SPDX-License-Identifier: Apache-2.0
"""launch/torchrun.sh on one node: what the user can fix is one line and exit code 2, and only that is not restarted."""

import re

import pytest
from programs import REPOSITORY, finish, start_script

SCRIPT, PROGRAM = "launch/torchrun.sh", "examples/pretrain_gpt.py"

# Rank 1 ends as it is told, after a line of its own; rank 0 goes on until it is ended.
ENDS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_DFL)
rank = os.environ["RANK"]
os.write(1, f"rank {rank} is here\\n".encode())  # whole: print writes the end of a line by itself
if rank == "1":
    how = int(sys.argv[1])
    os.kill(os.getpid(), -how) if how < 0 else sys.exit(how)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("NNODES", value) for value in ("two", "0", "4:2", "1:2:3")),
        *(("NPROC_PER_NODE", value) for value in ("0", "two", "08")),
        *(("NODE_RANK", value) for value in ("first", "-1")),
        *(("MASTER_PORT", value) for value in ("abc", "0", "70000")),
        *(("MAX_RESTARTS", value) for value in ("-1", "often")),
    ],
)
def test_a_bad_setting_is_named_in_one_line_before_anything_starts(name, value):
    said = finish(start_script(SCRIPT, PROGRAM, **{name: value}), code=2)
    assert said.startswith(f"error: {name}={value}: must be ") and said.count("\n") == 1, said


def test_several_nodes_without_an_address_and_a_program_that_is_not_there_are_named():
    said = finish(start_script(SCRIPT, PROGRAM, NNODES="2"), code=2)
    assert said.startswith("error: NNODES=2 without MASTER_ADDR: give the address") and said.count("\n") == 1
    said = finish(start_script(SCRIPT, "examples/pretrain.py", "--lr", "1"), code=2)
    assert said.startswith("error: examples/pretrain.py: no such program; give") and said.count("\n") == 1
    said = finish(start_script(SCRIPT, "--lr", "1"), code=2)
    assert said.startswith("error: --lr: the first argument is the program") and said.count("\n") == 1


def test_nothing_is_substituted_once_signals_are_trapped():
    """Bash 5.2 parses a substitution again as it runs, and a trap with it: once in 500 starts, too rare to provoke."""
    _, trap, rest = (REPOSITORY / SCRIPT).read_text().partition("\ntrap 'stopping=true'")
    code = [line.partition(" #")[0] for line in rest.splitlines() if not line.lstrip().startswith("#")]
    assert trap and not re.findall(r"\$\((?!\()|`|[<>]\(", "\n".join(code))


def test_a_mistyped_flag_is_told_once_by_two_processes_and_not_restarted():
    said = finish(start_script(SCRIPT, PROGRAM, "--lrr", "3", NPROC_PER_NODE="2"), code=2)
    assert said == "error: --lrr: unknown flag; did you mean --lr?\n"


@pytest.mark.parametrize(
    ("how", "code", "end"),
    [(2, 2, ""), (141, 141, ""), (75, 1, "ended with exit code 75"), (-9, 1, "was ended by SIGKILL")],
)
def test_only_what_the_user_can_fix_is_not_restarted(tmp_path, how, code, end):
    program = tmp_path / "ends.py"
    program.write_text(ENDS)
    said = finish(
        start_script(SCRIPT, str(program), str(how), NPROC_PER_NODE="2", MAX_RESTARTS="1"), code=code
    )
    own = [line for line in said.splitlines() if not line.startswith("rank ")]
    assert said.count("rank 1 is here") == (2 if end else 1), said
    assert own == [
        f"launch/torchrun.sh: rank 1 {end}; all processes start again (restart 1 of 1)",
        f"launch/torchrun.sh: error: rank 1 {end}; its output is above, and no restart is left (MAX_RESTARTS=1)",
    ] * bool(end), said
