# SPDX-License-Identifier: Apache-2.0
"""The comparison of two revisions: its arithmetic, and one small run of real revisions."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks" / "compare.py"
TINY = "--lengths 64 --heads 2 --kv-heads 1 --dim 16 --topk 4 --window 4 --stride 4 --dtype float32 --budget-ms 1"


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("compare", SCRIPT)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["compare"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def test_ratios_are_of_runs_of_one_round(module):
    """Both slow down together in the second round: that is no difference between them."""
    (case,) = module.compare([({"x": 1.0}, {"x": 1.1}), ({"x": 2.0}, {"x": 2.2}), ({"x": 1.0}, {"x": 1.2})])
    assert (case.a_ms, case.b_ms) == (1.0, 1.2)
    assert case.ratio == pytest.approx(1.1)
    assert case.slower_than(1.05) and not case.slower_than(1.15)
    assert "1.100 to 1.200" in str(case)


def runs(monkeypatch, module, times):
    """`main` with made-up times: calls by label, in order."""
    calls = []

    def run(tree, argv, label):
        calls.append(label)
        return {"x": times[label]}

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "unpacked", lambda revision, folder: folder)
    return calls


def test_revisions_take_turns_and_a_slower_one_fails(monkeypatch, module, capsys):
    calls = runs(monkeypatch, module, {"old": 1.0, "new": 1.2})
    assert module.main(["old", "new", "--rounds", "3", "--fail-above", "1.1"]) == 1
    assert calls == ["old", "new", "new", "old", "old", "new"]
    assert "slower than 1.1 in every round: x" in capsys.readouterr().out
    assert module.main(["old", "new", "--rounds", "1", "--fail-above", "1.3"]) == 0
    assert module.main(["old", "new", "--rounds", "1"]) == 0


@pytest.mark.parametrize("stopped", [False, True])
def test_a_real_comparison_leaves_nothing_behind(stopped, tmp_path):
    command = [sys.executable, str(SCRIPT), "HEAD", ".", "--rounds", "1", "--operations", "select", *TINY.split()]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    if stopped:
        while process.poll() is None and not list(tmp_path.glob("*/a/pyproject.toml")):
            time.sleep(0.01)
        process.terminate()
    out, error = process.communicate(timeout=120)
    assert "Traceback" not in error and process.returncode == (130 if stopped else 0), error
    assert stopped or out.splitlines()[1].startswith("select 64")
    assert not list(tmp_path.glob("tmp*"))


def test_an_unknown_revision_is_named():
    command = [sys.executable, str(SCRIPT), "no-such-revision", "."]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: no-such-revision: no such revision\n"


@pytest.mark.parametrize(
    "given", ["--rounds 0", "--fail-above 0", "--fail-above nan", "--budget-ms -1", "--lengths 0"]
)
def test_numbers_that_would_guard_nothing_are_refused(module, capsys, given):
    with pytest.raises(SystemExit) as ended:
        module.main(["HEAD", ".", *given.split()])
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(f"error: {given}: must be")


def test_a_path_is_a_checkout_taken_as_it_is(module, tmp_path, capsys):
    checkout = tmp_path / "before"
    with pytest.raises(SystemExit):
        module.unpacked(f"{tmp_path}/", tmp_path / "unused")
    assert "no checkout of this project" in capsys.readouterr().err
    (checkout / "kernels" / "sparsek_kernels").mkdir(parents=True)
    assert module.unpacked(str(checkout), tmp_path / "unused") == checkout.resolve()
    assert not (tmp_path / "unused").exists()
