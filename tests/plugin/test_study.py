# SPDX-License-Identifier: Apache-2.0
"""The study's fixed patterns are the masks that they claim to be, its data says what it means, and a table runs."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sparsek_kernels import sparsek_attention

from sparsek_megatron.errors import UserError

STUDY = Path(__file__).resolve().parents[2] / "examples" / "study"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The study's folder on the path."""
    monkeypatch.syspath_prepend(str(STUDY))
    import tables

    return tables


def allowed(kind: str, length: int, topk: int, window: int, stride: int) -> torch.Tensor:
    """[s, s] bool: the keys of each query, from the words of the arm's description."""
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    refresh = query // stride * stride
    if kind == "recent":
        return (key <= query) & (key > refresh - window - topk)
    return (key <= query) & ((key > refresh - window) | (key < topk))


@pytest.mark.parametrize("kind", ["recent", "first"])
def test_fixed_scores_are_a_window_and_sinks(kind: str, study: Any) -> None:
    length, topk, window, stride = 61, 5, 9, 4
    q, k, v = torch.randn(3, 1, length, 2, 16, dtype=torch.float64)
    position = torch.arange(length, dtype=torch.float64)[None, :, None].expand(1, length, 2)
    scores = position if kind == "recent" else -position
    got = sparsek_attention(q, k, v, scores, topk=topk, window=window, stride=stride, pool=topk)
    mask = allowed(kind, length, topk, window, stride)
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    torch.testing.assert_close(got, want.transpose(1, 2))
    from arms import baselines

    names = {arm.name: arm for arm in baselines(256, 256, 64)}
    assert names["window 512"].scores == "recent" and names["window 508 + 4 sinks"].scores == "first"
    assert all(arm.sparsek.topk + arm.sparsek.window in (512, 256) for arm in names.values())


@pytest.mark.parametrize("joined", [False, True])
def test_recall_shows_each_answer_once_before_its_question(joined: bool, study: Any) -> None:
    from data import Recall, generator

    length = 512
    recall = Recall(pairs=24, joined=joined)
    batch = recall.sample(generator(1, 2), 64, length)
    assert batch.distance is not None
    asked = batch.weights.nonzero()
    assert 20 * 64 < len(asked) <= 24 * 64, "few pairs fall on taken places"
    for row, i in asked.tolist():
        shown = i - int(batch.distance[row, i])
        assert 0 <= shown <= i - 4 and i < length
        key, value = (int(token) for token in batch.tokens[row, i : i + 2])
        once = [16 * (key - 32) + value - 16 + recall.first_joined] if joined else [key, value]
        assert batch.tokens[row, shown : shown + len(once)].tolist() == once
        assert (batch.tokens[row] == key).sum() == (1 if joined else 2), "a key is shown once and asked once"
    assert batch.tokens.max() < recall.vocabulary
    distances = batch.distance[batch.weights > 0]
    assert 0.25 < (distances >= 64).float().mean() < 0.6 and (distances < 16).any(), "near and far questions"


@pytest.mark.parametrize("name", ["genome", "series"])
def test_generated_data_is_repeatable_and_inside_its_vocabulary(
    name: str, study: Any, tmp_path: Path
) -> None:
    from data import Corpus, generator, make

    data: Any = make(name, Corpus(), tmp_path)
    first, again = (data.sample(generator(3), 4, 700).tokens for _ in range(2))
    assert torch.equal(first, again)
    assert first.min() >= 0 and first.max() < data.vocabulary and first.unique().numel() >= 4


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("table", ["scratch_4k", "ablations"])
def test_every_kind_of_arm_trains_what_it_should(table: str, study: Any) -> None:
    import run
    from model import DenseCoreAttention, build, start_megatron
    from steps import token_losses

    micro = run.micro(study.TABLES[table])
    tokens = torch.randint(0, 64, (1, 97), generator=torch.Generator().manual_seed(1))
    for arm in micro.arms:
        device = start_megatron(3)
        model = build(arm, micro, 64, device)
        token_losses(model, tokens).mean().backward()
        for index, layer in enumerate(model.decoder.layers):
            attention = layer.self_attention
            dense = arm.scores == "dense" or index in arm.full_layers
            assert isinstance(attention.core_attention, DenseCoreAttention) == dense
            gradient = attention.scorer.weight.grad
            learns = arm.scores == "learned" and not dense and not arm.sparsek.hard_selection
            assert (gradient is not None and bool(gradient.any())) == learns, (arm.name, index)
            if arm.scores == "keys":
                assert attention.core_attention.score_weight.grad.any()
                assert attention.scorer.slope.grad.any()
            slope = attention.scorer.slope
            if slope is not None:
                assert (slope == arm.sparsek.initial_slope).all()
            if arm.fixed_slope:
                assert slope is not None and slope.grad is None
            if arm.shared:
                scores = attention.scores(torch.randn(12, 1, 32))
                assert torch.equal(scores[..., 0], scores[..., 1])


@pytest.mark.usefixtures("megatron")
def test_scores_from_keys_rise_along_the_slope(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slope adds slope * position / L_ref to the scores of keys, and a steep one lets old keys go."""
    import run
    from model import build, start_megatron
    from steps import logits_of

    from sparsek_megatron import core_attention

    seen: list[torch.Tensor] = []

    def watch(query: Any, key: Any, value: Any, scores: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(scores.detach())
        return sparsek_attention(query, key, value, scores, **options)

    monkeypatch.setattr(core_attention, "sparsek_attention", watch)
    table = run.micro(study.TABLES["ablations_slope"])
    base = next(arm for arm in table.arms if arm.name == "scores from keys")
    tokens = torch.randint(0, 64, (2, 96), generator=torch.Generator().manual_seed(1))
    oldest_in_window = 96 - base.sparsek.window
    scores, logits, kept = {}, {}, {}
    for slope in (None, 0.0, 16.0, 3e3):  # 3e3: 12 a token here, more than scores differ by
        settings = {"position_slope": slope is not None, "initial_slope": slope or 0.0}
        arm = dataclasses.replace(base, sparsek=dataclasses.replace(base.sparsek, **settings))
        model = build(arm, table, 64, start_megatron(3))
        seen.clear()
        with torch.no_grad():
            logits[slope] = logits_of(model, tokens)
        scores[slope] = seen[0]
        best = seen[0][:, :oldest_in_window].topk(base.sparsek.topk, 1)
        kept[slope] = best.indices.sort(1).values
    relative = (torch.arange(96) / table.length)[None, :, None]
    torch.testing.assert_close(scores[None], scores[0.0])
    for slope in (16.0, 3e3):
        torch.testing.assert_close(scores[slope], scores[0.0] + slope * relative)
        assert not torch.allclose(logits[slope], logits[0.0], atol=1e-4)
    assert (kept[3e3] >= oldest_in_window - base.sparsek.topk).all(), "the newest"
    assert (kept[0.0] < oldest_in_window - base.sparsek.topk).any()


def test_runs_side_by_side_stop_at_the_same_step(study: Any) -> None:
    """Three runs of different speeds, one of which fails on its way."""
    import multiprocessing

    from pace import CHUNK, Pace

    pace = Pace(multiprocessing.get_context("spawn"), 3, time.time() + 0.3)
    taken: dict[int, list[tuple[float, float]]] = {0: [], 1: [], 2: []}

    def run(number: int) -> None:
        try:
            reached = 0.0
            while reached < 1 and not (number == 2 and len(taken[2]) == 3):
                time.sleep(0.01 * number)
                reached, a_step = pace.wait()
                taken[number].append((reached, a_step))
        finally:
            pace.leave()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert taken[0] == taken[1] and taken[0][:3] == taken[2] and len(taken[2]) == 3
    progress = [reached for reached, _ in taken[0]]
    assert progress[0] == 0 and progress[-1] == 1 and progress == sorted(progress)
    assert taken[0][1][1] == pytest.approx((progress[1] - progress[0]) / CHUNK)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense", "window 256", "SparseK key_value"])
def test_captured_steps_are_the_eager_ones(name: str, study: Any) -> None:
    import run
    from data import Batch, generator
    from megatron.core import parallel_state
    from model import build, start_megatron
    from steps import EAGER_STEPS, Optimizer, Stepper

    table = run.micro(study.TABLES["scratch_4k"])
    table = dataclasses.replace(table, model=dataclasses.replace(table.model, hidden_size=128))
    arm = next(arm for arm in table.arms if arm.name == name)
    losses = []
    for eager in (True, False):
        device = start_megatron(3)
        model = build(arm, table, 64, device)
        stepper = Stepper(model, Optimizer(model, 2e-3, 1.0), 2, 256, eager=eager)
        found = []
        for step in range(EAGER_STEPS + 5):
            tokens = torch.randint(0, 64, (2, 257), generator=generator(step)).cumsum(1) % 64
            stepper.step(Batch(tokens, torch.ones(2, 256)), 1.0)
            found.append(stepper.mean_loss())
        losses.append(found)
        assert (stepper.graph is None) == eager
    parallel_state.destroy_model_parallel()
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[0][-1] < losses[0][0] - 0.02, "the weights move between replays"


@pytest.mark.usefixtures("megatron")
def test_a_table_runs_and_continues(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trains a dense arm and two that start from its weights, and writes every file; again it has nothing to do."""
    import data
    import run

    monkeypatch.setattr(data.Drawn, "sequences", 16)
    command = ["budget_4k", "--micro", "--jobs", "1", "--seeds", "1", "--arms", "^dense|^window 256|logit"]
    for _ in range(2):
        assert run.main([*command, "--data", "genome", "--out", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert "| SparseK logit | 1 | 3 |" in printed
    assert "done" not in printed, "all runs were finished"
    folder = tmp_path / "budget_4k-genome-micro"
    pictures = ("loss_by_position_256.png", "loss_against_reference_256.png")
    for name in ("results.csv", "table.md", "hashes.txt", *pictures):
        assert (folder / name).stat().st_size > 0
    rows = (folder / "results.csv").read_text().splitlines()
    assert len(rows) == 1 + 1 + 3 * 2, "each arm at both lengths, what they start from at its own"
    assert (folder / "pretrained-seed1.pt").is_file()

    # Another table starts from the same weights without training them again.
    more = ["ablations", "--micro", "--jobs", "1", "--seeds", "1", "--data", "genome", "--out", str(tmp_path)]
    more += ["--arms", "mlp|from keys|no position slope", "--pretrained"]
    with pytest.raises(UserError, match="no finished pretrained, seed 1, with weights there"):
        run.main([*more, str(tmp_path / "elsewhere")])
    assert run.main([*more, str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "pretrained, seed 1: done" not in printed and "no position slope, seed 1: done" in printed
    log = folder / "pretrained-seed1.jsonl"
    assert (tmp_path / "ablations-genome-micro" / log.name).read_bytes() == log.read_bytes()
    log.write_text(log.read_text().replace('"length": 64,', '"length": 65,', 1))
    shutil.rmtree(tmp_path / "ablations-genome-micro")
    with pytest.raises(UserError, match="length was 65 there and is 64 here"):
        run.main([*more, str(folder)])


@pytest.mark.usefixtures("megatron")
def test_overhead_of_each_arm_is_measured_against_the_reference(
    study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import csv

    import overhead

    out = tmp_path / "new" / "overhead.csv"
    command = ["budget_4k", "--micro", "--steps", "1", "--repeats", "2", "--out", str(out)]
    with pytest.raises(UserError, match="--arms pretrained: no arm of budget_4k; it has dense, window 256"):
        overhead.main([*command, "--arms", "pretrained"])
    assert overhead.main([*command, "--arms", "^dense|^window 256|^pretrained|key_value$"]) == 0
    with open(out, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["arm"] for row in rows] == ["window 256", "dense", "SparseK key_value"], "the reference first"
    base = float(rows[0]["step_ms"])
    assert float(rows[0]["times_reference"]) == 1
    for row in rows:
        step = float(row["step_ms"])
        assert 0 < float(row["step_ms_min"]) <= step <= float(row["step_ms_max"])
        assert float(row["times_reference"]) == pytest.approx(step / base)
        assert float(row["tokens_per_second"]) == pytest.approx(1e3 * 512 / step), "two sequences of 256"
        assert row["peak_mib"] == "", "no GPU, no measurement"
    assert capsys.readouterr().out.count(" tokens/s  ") == 3
    assert overhead.main([*command, "--arms", "^dense"]) == 0
    with open(out, newline="") as stream:
        assert [row["times_reference"] for row in csv.DictReader(stream)] == [""], "nothing to compare with"
