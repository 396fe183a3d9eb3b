# SPDX-License-Identifier: Apache-2.0
"""The inspection of a model: numbers against the definitions, dead heads named, the page drawn by a real browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import REPOSITORY, environment
from sparsek_kernels import sparsek

from sparsek_megatron import SparseKConfig
from sparsek_megatron.inspect.heads import HeadStatistics, head_statistics
from sparsek_megatron.inspect.page import render
from sparsek_megatron.inspect.plot import draw
from sparsek_megatron.training.manifest import record_of, write_manifest

SETTINGS = SparseKConfig(topk=6, window=7, stride=4, pool=15)
LENGTH = 150
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def random_heads(spread: float = 1.0, heads: int = 2) -> list[HeadStatistics]:
    scores = spread * torch.randn(LENGTH, heads, generator=torch.Generator().manual_seed(3))
    return head_statistics(scores, SETTINGS, layer=1)


def selected(scores: torch.Tensor, point: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and gates at a refresh point, by definition."""
    candidates = scores[: max(0, point - SETTINGS.window + 1)]
    order = sorted(range(len(candidates)), key=lambda j: (-float(candidates[j]), j))[: SETTINGS.pool]
    gates = sparsek(candidates[order].double(), SETTINGS.topk)
    return torch.tensor(order[: SETTINGS.topk]), gates[: SETTINGS.topk]


def test_histograms_equal_a_count_by_definition() -> None:
    for head in random_heads():
        ages, gates, recent, questions = [], [], 0, 0
        for point in range(0, LENGTH, SETTINGS.stride):
            keys, values = selected(head.scores, point)
            ages += (point - keys).tolist()
            gates += values.tolist()
            candidates = point - SETTINGS.window + 1
            if candidates >= 2 * SETTINGS.topk:
                recent += int((keys >= candidates - SETTINGS.topk).sum())
                questions += SETTINGS.topk
            for j in range(point + 1):
                attended = j > point - SETTINGS.window or j in keys.tolist()
                assert attended == (point < int(head.evict[j])), (point, j)
        want = [
            sum(low <= age < high for age in ages)
            for low, high in zip(head.age_edges[:-1], head.age_edges[1:], strict=True)
        ]
        assert list(head.age_counts) == want
        assert sum(head.gate_counts) == len(gates)
        assert head.gate_counts[-1] == sum(gate >= 0.95 for gate in gates)
        assert head.recent == pytest.approx(recent / questions)
        assert head.warnings == []


def test_dead_heads_are_named() -> None:
    position = torch.arange(LENGTH, dtype=torch.float32)
    noise = torch.randn(LENGTH, generator=torch.Generator().manual_seed(4))
    columns = torch.stack([position, -position, 500 * noise, noise], dim=1)
    warnings = [head.warnings for head in head_statistics(columns, SETTINGS, layer=2)]
    assert any("layer 2, head 0" in w and "most recent" in w for w in warnings[0])
    assert any("layer 2, head 1" in w and "first ones" in w for w in warnings[1])
    assert any("layer 2, head 2" in w and "saturated" in w for w in warnings[2])
    assert warnings[3] == []


def test_overflow_shows_where_scores_are_too_close() -> None:
    wide, close = random_heads(spread=3.0), random_heads(spread=0.02)
    assert all(head.overflow == 0 for head in wide)
    assert all(head.overflow is not None and head.overflow > 0.9 for head in close)


def test_hard_selection_has_no_gates_to_judge() -> None:
    hard = SparseKConfig(topk=6, window=7, stride=4, hard_selection=True)
    head = head_statistics(torch.randn(LENGTH, 1), hard, layer=0)[0]
    assert head.saturated is None and head.overflow is None and head.warnings == []


def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)}")
    return found


def drawn(page: Path, folder: Path, query: int | None = None) -> str:
    """The page's DOM after its script ran, with the slider at `query`."""
    command = [
        browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}",
        "--dump-dom",
    ]
    if query is not None:
        text = page.read_text().replace("\ndraw();\n", f"\nslider.value = {query}; draw();\n")
        page = page.with_name("moved.html")
        page.write_text(text)
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.parametrize("query", [None, 90])
def test_a_browser_highlights_what_the_last_or_another_query_attends_to(
    query: int | None, tmp_path: Path
) -> None:
    heads = random_heads()
    tokens = [f"w{j} " for j in range(LENGTH - 1)] + ["</script><b>&"]
    page = tmp_path / "report.html"
    page.write_text(render(tokens, heads, SETTINGS, png=draw(heads, stride=4, title="t"), title="a <title>"))
    dom = drawn(page, tmp_path / "profile", query)
    at = LENGTH - 1 if query is None else query
    refresh = at // 4 * 4
    text = re.search(r'<div id="text">(.*?)</div>', dom, re.S)
    assert text
    classes = re.findall(r'<span class="(\w*)"', text.group(1))
    assert len(classes) == LENGTH and classes[at] == "query"
    keys, _ = selected(heads[0].scores, refresh)
    assert {j for j, kind in enumerate(classes) if kind == "kept"} == set(keys.tolist())
    assert {j for j, kind in enumerate(classes) if kind == "local"} == set(range(refresh - 6, at))
    assert "&lt;/script&gt;&lt;b&gt;&amp;" in dom and "a &lt;title&gt;" in dom
    assert len(re.findall("<option", dom)) == 2
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", dom), "nothing is loaded from elsewhere"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of a few steps on this repository's own sources."""
    folder = tmp_path_factory.mktemp("inspect")

    def start(script: str, *arguments: str) -> None:
        command = [sys.executable, str(REPOSITORY / "examples" / script), *arguments]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]

    start(
        "prepare_data.py",
        *(
            "--input",
            str(REPOSITORY / "sparsek_megatron"),
            "--include",
            "*.py",
            "--validation-fraction",
            "0.1",
        ),
        *("--train-tokenizer", "--vocab-size", "400", "--tokenizer-model", str(folder / "t.model")),
        *("--output-prefix", str(folder / "text")),
    )
    shape = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --seq-length 128 "
        "--sparsek-topk 8 --sparsek-window 8 --sparsek-stride 4 --micro-batch-size 2 --train-iters 5 --lr 1e-2 "
        "--nproc-per-node 2 --tensor-model-parallel-size 2 --sequence-parallel"
    )
    data = ("--tokenizer-model", str(folder / "t.model"))
    data += ("--train-data-path", str(folder / "text_train"), "--valid-data-path", str(folder / "text_valid"))
    start("pretrain_gpt.py", *shape.split(), *data, "--save", str(folder / "run"))
    return folder / "run"


def inspect(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparsek_megatron.inspect", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, cwd=REPOSITORY)


def test_a_trained_checkpoint_gives_a_page_a_picture_and_numbers(run: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_text(
        "# caf\N{LATIN SMALL LETTER E WITH ACUTE}\n" + "def f(x):\n    return [x, 'value']\n" * 20
    )
    done = inspect(str(run), "--text", str(text), "--max-tokens", "120", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 heads of 2 layers, 120 tokens" in done.stdout
    numbers = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert [(n["layer"], n["head"]) for n in numbers] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(sum(n["gate_counts"]) == sum(n["age_counts"]) > 0 for n in numbers)
    assert (tmp_path / "out" / "selection.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "report.html").read_text()
    assert base64.b64encode((tmp_path / "out" / "selection.png").read_bytes()).decode() in page
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert found
    data = json.loads(found.group(1))
    assert text.read_text().startswith("".join(data["tokens"])) and len(data["tokens"]) == 120
    two = ("--tensor-model-parallel-size", "2", "--out", str(tmp_path / "two"))
    done = inspect(str(run), "--text", str(text), "--max-tokens", "120", *two)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two" / "statistics.json").read_text()) == numbers
    short = inspect(str(run), "--text", str(text), "--max-tokens", "12")
    assert short.returncode == 2 and "12 tokens, and 16 (topk + window)" in short.stderr
    assert len(short.stderr.strip().splitlines()) == 1


def test_a_run_with_context_parallelism_is_read_and_damaged_weights_are_passed_over(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (step,) = folder.glob("step_*")
    saved = json.loads((step / "run.json").read_text())
    settings = saved["settings"] | {"context_parallel_size": 2, "apply_rope_fusion": True}
    (step / "run.json").write_text(json.dumps(saved | {"settings": settings}))
    write_manifest(step, {path.name: record_of(path) for path in step.iterdir() if path.name != "manifest.json"})
    text = REPOSITORY / "sparsek_megatron" / "files.py"
    newer = step.with_name("step_00000009")
    shutil.copytree(step, newer)
    (folder / "latest").write_text(newer.name)
    file = newer / "mp_rank_01_model_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = inspect(str(folder), "--text", str(text), "--max-tokens", "101")
    assert done.returncode == 0 and "4 heads of 2 layers, 101 tokens" in done.stdout, done.stderr[-3000:]
    assert f"warning: {newer}: {file.name} is damaged" in done.stderr
    shutil.rmtree(step)
    done = inspect(str(folder), "--text", str(text))
    said = [line for line in done.stderr.splitlines() if not line.startswith("GPTModel IS DEPRECATED")]  # by mcore 0.19
    assert done.returncode == 2 and len(said) == 1, done.stderr
    assert said[0].startswith(f"error: {folder}: no checkpoint there is intact ({newer}: {file.name} is damaged")
