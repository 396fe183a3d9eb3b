# SPDX-License-Identifier: Apache-2.0
"""The search for tile shapes: takes the fastest that fits, and only for what it was asked about."""

import pytest
import torch
import triton
from sparsek_kernels import sparsek_attention
from sparsek_kernels.attention.plan import Tiling, install_tilings, tilings_for
from sparsek_kernels.attention.tune import tune_tilings

CPU = torch.device("cpu")
SMALL, SMALLER, TOO_LARGE = Tiling(16, 16, 4, 1), Tiling(16, 32, 4, 1), Tiling(32, 16, 4, 1)


@pytest.fixture
def restored():
    yield
    install_tilings(CPU, torch.float32, 64, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
def test_installs_the_fastest_tiling_that_fits(restored):
    before = tilings_for(CPU, torch.float32, 64)
    times = iter((3.0, None, 2.0, 1.0, 5.0, 4.0))  # forward: in use, too large, two more; backward_query: two

    def timer(call):
        call()
        time = next(times)
        if time is None:
            raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        return time

    lines = []
    best = tune_tilings(
        query_heads=2,
        kv_heads=1,
        head_dim=64,
        topk=16,
        window=16,
        tokens=130,
        dtype=torch.float32,
        device="cpu",
        candidates={"forward": (TOO_LARGE, SMALL, SMALLER), "backward_query": (SMALL,)},
        timer=timer,
        report=lines.append,
    )
    assert best.forward == SMALLER
    assert best.backward_query == SMALL
    assert best.backward_band == before.backward_band
    assert "does not fit" in lines[1]
    assert len(lines) == 6
    assert tilings_for(CPU, torch.float32, 64) == best
    assert tilings_for(CPU, torch.float32, 128) != best
    query, key, value = (torch.randn(1, 150, heads, 64) for heads in (2, 1, 1))
    scores = torch.randn(1, 150, 1)
    kw = {"topk": 16, "window": 16, "pool": 64}
    actual = sparsek_attention(query, key, value, scores, backend="triton", **kw)
    torch.testing.assert_close(actual, sparsek_attention(query, key, value, scores, backend="torch", **kw))


@pytest.mark.gpu
def test_gpu_search_leaves_results_right():
    lines = []
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        tune_tilings(
            query_heads=4,
            kv_heads=1,
            head_dim=64,
            topk=64,
            window=64,
            tokens=1024,
            candidates={"forward": (Tiling(64, 64, 4, 2), Tiling(64, 128, 4, 12))},  # the last fits no GPU
            report=lines.append,
        )
        assert "does not fit" in lines[-1]
        query, key, value = (
            torch.randn(1, 1500, h, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 1, 1)
        )
        scores = torch.randn(1, 1500, 1, device="cuda")
        actual = sparsek_attention(query, key, value, scores, topk=64, window=64)
        expected = sparsek_attention(
            query.double(), key.double(), value.double(), scores.double(), topk=64, window=64, backend="torch"
        )
        assert (actual.double() - expected).norm() / expected.norm() < 1e-2
    finally:
        install_tilings(device, torch.bfloat16, 64, None)
