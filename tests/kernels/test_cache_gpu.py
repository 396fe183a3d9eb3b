# SPDX-License-Identifier: Apache-2.0
"""The compiled decoding kernels on a GPU: against the torch backend in float64, and inside a CUDA graph."""

import pytest
import torch
from sparsek_kernels import SparseKCache, sparsek_attention

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-2, torch.float32: 1e-5}


def make_inputs(n, hq, hkv, d, dtype, batch):
    q = torch.randn(batch, n, hq, d, device="cuda", dtype=dtype)
    k, v = (torch.randn(batch, n, hkv, d, device="cuda", dtype=dtype) for _ in range(2))
    return q, k, v, torch.randn(batch, n, hkv, device="cuda")


def make_cache(inputs, **options):
    q, k, _, _ = inputs
    return SparseKCache(q.shape[0], k.shape[2], q.shape[3], dtype=q.dtype, device="cuda", **options)


def check(n, cut, hq=8, hkv=2, d=128, dtype=torch.bfloat16, batch=2, **options):
    inputs = make_inputs(n, hq, hkv, d, dtype, batch)
    cache = make_cache(inputs, **options)
    outputs = [cache.prefill(*(x[:, :cut] for x in inputs))] if cut else []
    outputs += [cache.decode(*(x[:, i : i + 1] for x in inputs)) for i in range(cut, n)]
    expected = sparsek_attention(*(x.double() for x in inputs), backend="torch", **options)
    error = (torch.cat(outputs, dim=1).double() - expected).abs().max().item()
    assert error < TOLERANCE[dtype], error


@pytest.mark.parametrize("gate", ["key_value", "value", "logit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("stride", "n", "cut"), [(64, 400, 150), (16, 300, 130), (1, 260, 130), (100, 420, 0)]
)
def test_generation_equals_one_forward(gate, dtype, stride, n, cut):
    check(n, cut, dtype=dtype, topk=48, window=40, stride=stride, gate=gate)


@pytest.mark.parametrize("d", [64, 80, 96, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_head_dimensions(d, dtype):
    check(300, 200, d=d, dtype=dtype, topk=48, window=40)


@pytest.mark.parametrize("group", [1, 3, 7, 16, 32])
@pytest.mark.parametrize("batch", [1, 40])
def test_group_and_batch_sizes(group, batch):
    check(300, 230, hq=2 * group, batch=batch, topk=48, window=40)


@pytest.mark.parametrize(("topk", "pool"), [(512, 2048), (100, 150), (100, 100), (1024, 16384)])
def test_pools(topk, pool):
    check(2300, 2000, batch=1, topk=topk, pool=pool, window=64, stride=16)


def test_a_graph_replays_through_refreshes_of_rows_of_different_lengths():
    inputs = make_inputs(400, 8, 2, 128, torch.bfloat16, 3)
    options = {"topk": 48, "window": 40, "stride": 16}
    lengths = [200, 170, 13]
    eager, replayed = make_cache(inputs, **options), make_cache(inputs, **options)
    for cache in (eager, replayed):
        cache.prefill(*(x[:, :200] for x in inputs), lengths=lengths)
    token = [x[:, 200:201].clone() for x in inputs]
    before = replayed.fork()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        before.decode(*token)  # compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = replayed.decode(*token)
    for i in range(200, 400):
        for held, x in zip(token, inputs, strict=True):
            held.copy_(x[:, i : i + 1])
        graph.replay()
        assert torch.equal(out, eager.decode(*token)), i
    assert replayed.lengths.tolist() == [length + 200 for length in lengths]
    for name, tensor in eager._buffers.tensors().items():
        assert torch.equal(tensor, getattr(replayed._buffers, name)), name


def test_decoding_never_waits_for_the_device():
    inputs = make_inputs(100, 8, 2, 128, torch.bfloat16, 2)
    cache = make_cache(inputs, topk=16, window=16, stride=4)
    cache.prefill(*(x[:, :60] for x in inputs))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(60, 100):
            cache.decode(*(x[:, i : i + 1] for x in inputs))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_prefill_in_pieces_waits_for_the_device_only_behind_a_captured_step():
    inputs = make_inputs(900, 8, 2, 128, torch.bfloat16, 2)
    options = {"topk": 16, "window": 16, "stride": 16}
    whole = make_cache(inputs, **options).prefill(*inputs)
    cache, outputs = make_cache(inputs, **options), []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for start in range(0, 800, 160):
            outputs.append(cache.prefill(*(x[:, start : start + 160] for x in inputs)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    token = [x[:, 800:801].clone() for x in inputs]
    with torch.cuda.stream(torch.cuda.Stream()):
        cache.fork().decode(*token)  # compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step = cache.decode(*token)
        with pytest.raises(NotImplementedError, match="prefill cannot be captured"):
            cache.prefill(*token)
    for i in range(800, 850):
        for held, x in zip(token, inputs, strict=True):
            held.copy_(x[:, i : i + 1])
        graph.replay()
        outputs.append(step.clone())
    assert cache.lengths_on_host() == [850, 850]
    outputs.append(cache.prefill(*(x[:, 850:] for x in inputs)))
    assert (torch.cat(outputs, dim=1) - whole).abs().max() < 2e-2


def test_a_cache_moves_between_devices_by_its_file(tmp_path):
    inputs = make_inputs(200, 4, 2, 64, torch.float32, 2)
    cache = make_cache(inputs, topk=16, window=16, stride=16)
    cache.prefill(*(x[:, :150] for x in inputs))
    cache.save(tmp_path / "cache.pt")
    on_cpu = SparseKCache.load(tmp_path / "cache.pt")
    for i in range(150, 200):
        token = [x[:, i : i + 1] for x in inputs]
        assert (cache.decode(*token).cpu() - on_cpu.decode(*(x.cpu() for x in token))).abs().max() < 1e-5
