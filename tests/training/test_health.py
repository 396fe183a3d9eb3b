# SPDX-License-Identifier: Apache-2.0
"""Health numbers against loops that follow the definitions."""

import dataclasses

import pytest
import torch

from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.flops import flops_per_token, mean_attended_keys, peak_tflops
from sparsek_megatron.training.health import SAMPLES, SelectionWatch, selection_counts
from sparsek_megatron.training.model import token_losses


@pytest.mark.parametrize(("length", "topk", "window", "stride"), [(63, 5, 7, 4), (64, 8, 8, 1), (20, 16, 16, 8)])
def test_attended_keys_are_counted_as_defined(length, topk, window, stride):
    total = 0
    for i in range(length):
        c = stride * (i // stride)
        local = [j for j in range(length) if c - window < j <= i]
        candidates = [j for j in range(length) if j <= c - window]
        total += len(local) + min(topk, len(candidates))
    assert mean_attended_keys(length, topk=topk, window=window, stride=stride) == pytest.approx(total / length)


def test_operations_of_a_dense_model_are_six_per_weight_and_token():
    config = TrainingConfig(num_layers=3, hidden_size=64, num_attention_heads=4, num_query_groups=2, seq_length=32)
    covering = dataclasses.replace(config, sparsek_topk=32, sparsek_window=32, sparsek_stride=1)
    weights = 3 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * config.mlp_width + 64 * 2) + 64 * 512
    attention = 3 * 3 * 4 * 64 * (32 + 1) / 2  # queries see (n + 1) / 2 keys on average
    assert flops_per_token(covering, 512) == pytest.approx(6 * weights + attention)


def test_peaks_are_known_by_name():
    assert peak_tflops("NVIDIA H200") == 989.0 and peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("NVIDIA H200 NVL") == 835.5 and peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312.0 and peak_tflops("NVIDIA GH200 480GB") == 989.0
    assert peak_tflops("NVIDIA RTX A1000") is None and peak_tflops("Some GPU") is None


@pytest.mark.parametrize("spread", [0.05, 1.0, 4.0])
def test_selection_is_described_as_it_is(spread):
    topk, window, stride, pool = 4, 6, 4, 16
    scores = spread * torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(0))
    points = [c for c in range(0, 60, stride) if c >= window]
    picked = torch.linspace(0, len(points) - 1, SAMPLES).round().long().unique().tolist()
    saturated = selected = ages = 0
    for b in range(2):
        for head in range(3):
            for c in (points[i] for i in picked):
                u = scores[b, : c - window + 1, head].double()
                best = sorted(range(len(u)), key=lambda j: -u[j])[:pool]
                low, high = float(u.min()) - 2, float(u.max())
                for _ in range(200):  # tau by bisection
                    tau = (low + high) / 2
                    mass = sum(min(max(float(u[j]) - tau, 0.0), 1.0) for j in best)
                    low, high = (tau, high) if mass > topk else (low, tau)
                chosen = best[:topk]
                full = len(best) <= topk
                saturated += sum(full or float(u[j]) - tau >= 1 - 1e-6 for j in chosen)
                selected += len(chosen)
                ages += sum(c - j for j in chosen)
    counts = selection_counts(scores, topk=topk, window=window, stride=stride, pool=pool).tolist()
    assert counts[:3] == [saturated, selected, ages]
    assert 0 <= counts[3] <= counts[4] and (spread > 0.1 or counts[3] > 0)


def test_hard_selection_has_no_pool_to_overflow(config, model):
    overflows = {}
    for hard in (False, True):
        watch = SelectionWatch(dataclasses.replace(config, sparsek_hard_selection=hard), model)
        watch.arm()
        with torch.no_grad():
            token_losses(model, torch.arange(64)[None], None)
        watch.disarm()
        seen = watch.collect(torch.device("cpu"))
        assert seen.mean_age is not None
        overflows[hard] = seen.overflow
    assert overflows[False] is not None and overflows[True] is None
