# SPDX-License-Identifier: Apache-2.0
"""Which tokens a step sees: Megatron's datasets behind an order that depends on nothing but the seed."""

import contextlib
import os
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import get_blend_from_list, normalize
from programs import REPOSITORY, kill_all, start_code

from sparsek_megatron.data import datasets, index_cache, whole
from sparsek_megatron.data.datasets import StepSampler, batches, build_datasets, validation_entropy
from sparsek_megatron.data.index_cache import complete_cache
from sparsek_megatron.data.paths import DataPaths, check_data, parse_blend, parse_split
from sparsek_megatron.data.tokenizer import SentencePieceTokenizer
from sparsek_megatron.errors import UserError

sys.path.insert(0, str(REPOSITORY / "examples"))

from training_benchmark.model import read_tokens


@pytest.fixture(autouse=True, scope="module")
def process_group():
    """mcore's blended datasets ask for their rank; another test of this process may have made a group already."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(prepared, cache: Path, paths: DataPaths, *, train: int = 40, valid: int = 4, length: int = 64, seed: int = 1):
    tokenizer = SentencePieceTokenizer.load(prepared.tokenizer)
    return build_datasets(
        paths, tokenizer, sequence_length=length, train_samples=train, valid_samples=valid, seed=seed, cache=cache
    )


def test_samples_are_pieces_of_the_text_shifted_by_one(prepared, tmp_path):
    paths = DataPaths(train=(prepared.train,), valid=(prepared.valid,))
    train, valid = build(prepared, tmp_path, paths)
    assert isinstance(train, GPTDataset) and isinstance(valid, GPTDataset)
    dataset = IndexedDataset(prepared.train)
    stream = np.concatenate([dataset[i] for i in range(len(dataset))])
    for sample in (train[0], train[7]):
        assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids"}
        tokens, labels = sample["tokens"].numpy(), sample["labels"].numpy()
        assert (tokens[1:] == labels[:-1]).all() and sample["loss_mask"].min() == 1
        inside = tokens[: max(8, int(np.argmax(tokens == 1)))]  # up to the end of a document
        windows = np.lib.stride_tricks.sliding_window_view(stream, len(inside))
        assert (windows == inside).all(axis=1).any()


def test_the_order_depends_on_the_seed_alone(prepared, tmp_path):
    paths = DataPaths(train=(prepared.train,), valid=(prepared.valid,))
    first, again, other = (
        [build(prepared, tmp_path / name, paths, seed=seed)[0][i]["tokens"].tolist() for i in range(10)]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again != other


@pytest.mark.parametrize("split", ["100", "95,5,0"])
def test_no_validation_samples_ask_for_no_validation_part(prepared, tmp_path, split):
    train, valid = build(prepared, tmp_path, DataPaths(blend=(prepared.train,), split=split), valid=0)
    assert valid is None
    assert train[39]["tokens"].shape == (64,)


def copy(source: str, prefix: Path) -> None:
    for suffix in (".bin", ".idx"):
        Path(f"{prefix}{suffix}").write_bytes(Path(source + suffix).read_bytes())


def test_data_prepared_again_under_its_name_gets_an_index_of_its_own(prepared, tmp_path):
    paths = DataPaths(train=(str(tmp_path / "data"),), valid=(prepared.valid,))
    lengths = []
    for source in (prepared.train, prepared.valid, prepared.train):
        copy(source, tmp_path / "data")
        train, _ = build(prepared, tmp_path / "cache", paths)
        fresh, _ = build(prepared, tmp_path / f"cache of its own {len(lengths)}", paths)
        assert [train[i]["tokens"].tolist() for i in range(40)] == [fresh[i]["tokens"].tolist() for i in range(40)]
        lengths.append(len(train))
    assert lengths[0] == lengths[2] != lengths[1]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_disk_that_fills_leaves_no_half_index(prepared, tmp_path, monkeypatch):
    paths = DataPaths(train=("0.7", prepared.train, "0.3", prepared.valid), valid=(prepared.valid,))
    whole, written = np.save, []

    def save(path, *arguments, **options):
        if len(written) == 4:
            Path(path).write_bytes(b"half")
            raise OSError("1000 requested and 4 written")  # what NumPy says then, without an error number
        whole(path, *arguments, **options)
        written.append(path)

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", save)
        with pytest.raises(UserError, match=r"--data-cache-path .*/cache: .* cannot be written there \(1000 req"):
            build(prepared, tmp_path / "cache", paths)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(build(prepared, tmp_path / "cache", paths)[0]) >= 40
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written there \(Not a directory"):
        build(prepared, tmp_path / "file", paths)


class Malicious:
    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def object_array(path: Path, run: Path) -> None:
    """What has NumPy's header, and a pickle behind it."""
    array = np.empty(1, dtype=object)
    array[0] = Malicious(run)
    np.save(path, array, allow_pickle=True)


HARMS = {
    "pickle": lambda path, run: path.write_bytes(pickle.dumps(Malicious(run))),
    "object array": object_array,
    "cut": lambda path, run: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path, run: path.write_bytes(b""),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("index", ["document_index", "dataset_index"])
def test_no_pickle_in_the_place_of_an_index_is_run(prepared, tmp_path, capsys, harm, index):
    paths = DataPaths(train=("0.7", prepared.train, "0.3", prepared.valid), valid=(prepared.valid,))
    before = [build(prepared, tmp_path / "cache", paths)[0][i]["tokens"].tolist() for i in range(9)]
    (folder,) = (tmp_path / "cache").iterdir()
    HARMS[harm](next(folder.glob(f"*-{index}.npy")), tmp_path / "run")
    train, _ = build(prepared, tmp_path / "cache", paths)
    assert not (tmp_path / "run").exists()
    assert [train[i]["tokens"].tolist() for i in range(9)] == before
    assert f"{index}.npy: not an array" in capsys.readouterr().err
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_mcore_unpickles_nothing_that_takes_an_index_place_after_the_look(prepared, tmp_path, monkeypatch):
    paths = DataPaths(train=(prepared.train,), valid=(prepared.valid,))
    build(prepared, tmp_path / "cache", paths)
    for path in (tmp_path / "cache").glob("*/*train-document_index.npy"):
        path.write_bytes(pickle.dumps(Malicious(tmp_path / "run")))
    monkeypatch.setattr(index_cache, "_put_away_damaged", lambda *_: None)
    with pytest.raises(ValueError, match="pickled"):
        build(prepared, tmp_path / "cache", paths)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(datasets, "plain_arrays", contextlib.nullcontext)
    with contextlib.suppress(pickle.UnpicklingError):  # of mcore 0.19, whose unpickler knows few classes
        build(prepared, tmp_path / "cache", paths)
        assert (tmp_path / "run").exists(), "mcore would have run its code"


SLOW_BUILD = """
import time
from pathlib import Path
import torch.distributed as dist
from sparsek_megatron.data.index_cache import complete_cache

def build(folder):
    (folder / "index.npy").write_bytes(b"half")
    time.sleep(600)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
complete_cache(Path({cache!r}), [{prefix!r}], {{"seed": {seed}}}, build)
"""


def partials(cache: Path) -> set[str]:
    return {path.parent.name for path in cache.glob(".*.partial-*/index.npy")}


def test_what_a_killed_build_left_is_removed_and_what_a_running_one_writes_is_not(prepared, tmp_path):
    def build(folder: Path) -> None:
        (folder / "index.npy").write_bytes(b"whole")

    running = [start_code(SLOW_BUILD.format(cache=str(tmp_path), prefix=prepared.train, seed=seed)) for seed in (1, 2)]
    try:
        deadline = time.monotonic() + 100
        while len(partials(tmp_path)) < 2:
            assert time.monotonic() < deadline and not any(each.poll() for each in running)
            time.sleep(0.05)
        both = partials(tmp_path)
        same = complete_cache(tmp_path, [prepared.train], {"seed": 1}, build)  # which one of them is building too
        assert (same / "index.npy").read_bytes() == b"whole" and partials(tmp_path) == both
        kill_all(running[0])
        assert complete_cache(tmp_path, [prepared.train], {"seed": 1}, build) == same
        (left,) = partials(tmp_path)
        assert left in both and not left.startswith(f".{same.name}")
        kill_all(running[1])
        complete_cache(tmp_path, [prepared.train], {"seed": 2}, build)
    finally:
        for each in running:
            if each.poll() is None:
                kill_all(each)
    assert len(list(tmp_path.iterdir())) == 2 and not partials(tmp_path)


@pytest.mark.parametrize("lock", ["another-machine", "", None], ids=["elsewhere", "not held yet", "no lock"])
def test_a_build_that_may_run_on_another_machine_is_left_for_a_day(prepared, tmp_path, lock):
    partial = tmp_path / f".{'0123456789abcdef' * 2}.partial-01234567"
    partial.mkdir()
    (partial / "index.npy").write_bytes(b"half")
    if lock is not None:
        (partial / ".lock").write_text(lock)
    complete_cache(tmp_path, [prepared.train], {}, lambda folder: None)
    assert partials(tmp_path) == {partial.name}
    yesterday = time.time() - 25 * 3600
    for path in (*partial.iterdir(), partial):
        os.utime(path, (yesterday, yesterday))
    complete_cache(tmp_path, [prepared.train], {}, lambda folder: None)
    assert not partial.exists()


def test_blends_and_splits_of_one_dataset(prepared, tmp_path):
    train, valid = build(prepared, tmp_path, DataPaths(blend=(prepared.train,), split="90,10,0"))
    assert len(train) >= 40 and len(valid) >= 4
    blend = ("0.7", prepared.train, "0.3", prepared.valid)
    mixed, _ = build(prepared, tmp_path, DataPaths(train=blend, valid=(prepared.valid,)), train=100)
    assert len(mixed) >= 100


def test_too_little_data_is_refused(prepared, tmp_path):
    paths = DataPaths(train=(prepared.train,), valid=(prepared.valid,))
    with pytest.raises(UserError, match=r"--seq-length 10000000: .* has only"):
        build(prepared, tmp_path, paths, length=10_000_000)
    unweighted = DataPaths(train=(prepared.train, prepared.valid), valid=(prepared.valid,))
    with pytest.raises(UserError, match="give the blend weights"):
        build(prepared, tmp_path, unweighted, train=1_000_000)


def dataset_of(prefix: Path, lengths: list[int]) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in lengths:
        builder.add_document(np.full(length, 7), [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.mark.parametrize(
    ("lengths", "split", "said"),
    [
        ([200] * 10, "95,5,0", r"valid part of .*/data has 0 of its 10 documents and 0 tokens"),
        ([200] * 40, "99.99,0.01,0", "valid part of .*/(data|large) has 0 of its [24]0+ documents"),
        ([200] * 40, "95,4,1", "test part of .*/data has 0 of its 40"),
        ([200] * 19 + [0], "95,5,0", "valid part of .*/data has 1 of its 20 documents and 0 tokens"),
    ],
)
@pytest.mark.timeout(60, func_only=True)
def test_a_part_of_the_split_without_tokens_is_refused(prepared, tmp_path, lengths, split, said):
    data, large = dataset_of(tmp_path / "data", lengths), dataset_of(tmp_path / "large", [200] * 200)
    blends = [(data,), ("1", data), ("0.5", large, "0.5", data), (large, large, data)]
    for blend in blends:
        with pytest.raises(UserError, match=rf"^--split {split}: the {said}.* separate --train-data-path and"):
            build(prepared, tmp_path / "cache", DataPaths(blend=blend, split=split))
    assert not (tmp_path / "cache").exists()


@pytest.mark.timeout(60, func_only=True)
def test_the_smallest_parts_that_megatron_takes_are_taken(prepared, tmp_path):
    data, large = dataset_of(tmp_path / "data", [200] * 11), dataset_of(tmp_path / "large", [200] * 200)
    for blend in ((data,), ("0.5", large, "0.5", data)):
        train, valid = build(prepared, tmp_path / "cache", DataPaths(blend=blend))
        assert len(train) >= 40 and len(valid) >= 4
    short = dataset_of(tmp_path / "short", [200] * 10 + [64])
    assert len(build(prepared, tmp_path / "cache", DataPaths(blend=("1", short)))[1]) >= 4
    with pytest.raises(UserError, match=r"valid part of .*/short has 1 of its 11 .* 64 tokens, and needs 65"):
        build(prepared, tmp_path / "cache", DataPaths(blend=(large, large, short)))


CUTS = {
    ".bin": [0, 1, 100, -1],
    ".idx": [0, 5, 20, 33, 34, 100, -1],
}


@pytest.mark.parametrize(("suffix", "size"), [(suffix, size) for suffix, sizes in CUTS.items() for size in sizes])
def test_a_file_that_was_half_copied_is_named(prepared, tmp_path, suffix, size):
    prefix, tokenizer = tmp_path / "data", SentencePieceTokenizer.load(prepared.tokenizer)
    copy(prepared.train, prefix)
    path = Path(f"{prefix}{suffix}")
    path.write_bytes(path.read_bytes()[:size])
    paths = DataPaths(train=(str(prefix),), valid=(prepared.valid,))
    said = rf"^--train-data-path {path}: cut short.*; copy it again"
    with pytest.raises(UserError, match=said):
        check_data(paths, tokenizer, prepared.tokenizer)
    with pytest.raises(UserError, match=said):
        build(prepared, tmp_path / "cache", paths)
    with pytest.raises(UserError, match=said.replace("--train-data", "--data")):
        read_tokens(str(prefix), 100)


def test_files_that_are_not_of_one_dataset_are_refused(prepared, tmp_path):
    prefix = tmp_path / "data"

    def refused(said: str) -> None:
        with pytest.raises(UserError, match=said):
            build(prepared, tmp_path / "cache", DataPaths(train=(str(prefix),), valid=(prepared.valid,)))

    copy(prepared.valid, prefix)
    Path(f"{prefix}.bin").write_bytes(Path(prepared.train + ".bin").read_bytes())
    refused("data.bin: has .* bytes and its .idx tells of .*; copy both again")
    index = Path(f"{prefix}.idx")
    whole = index.read_bytes()
    index.write_bytes(b"text" + whole)
    refused("data.idx: not an index of Megatron's")
    index.write_bytes(whole[:17] + b"\xff" + whole[18:])
    refused("data.idx: damaged, or of another version")
    index.write_bytes(whole[:-8] + bytes(8))
    refused("data.idx: damaged, its documents end")


def test_every_type_of_token_has_its_size():
    assert {kind.value: DType.size(kind.value) for kind in DType} == whole._TOKEN_BYTES


def sampled(first: int, last: int, *, micro: int, world: int, batch: int = 8) -> list[int]:
    """Samples of steps in the order of steps, all ranks together."""
    ranks = [
        list(StepSampler(first_sample=first * batch, last_sample=last * batch, micro_batch_size=micro,
                         global_batch_size=batch, rank=rank, world_size=world))
        for rank in range(world)
    ]  # fmt: skip
    per_step = batch // world // micro
    order = []
    for step in range(last - first):
        for rank in ranks:
            order += [i for group in rank[step * per_step : (step + 1) * per_step] for i in group]
    return order


@pytest.mark.parametrize(("micro", "world"), [(1, 1), (2, 1), (8, 1), (2, 2), (1, 4), (2, 4), (1, 8)])
def test_each_step_sees_the_same_samples_on_any_layout(micro, world):
    assert sampled(0, 5, micro=micro, world=world) == list(range(40))
    assert sampled(3, 5, micro=micro, world=world) == list(range(24, 40))


def test_batches_are_stacked_samples(prepared, tmp_path):
    train, _ = build(prepared, tmp_path, DataPaths(train=(prepared.train,), valid=(prepared.valid,)))
    sampler = StepSampler(
        first_sample=4, last_sample=8, micro_batch_size=2, global_batch_size=4, rank=0, world_size=1
    )
    got = list(batches(train, sampler, num_workers=0, pin=False))
    assert [b["tokens"].shape for b in got] == [(2, 64), (2, 64)] and len(sampler) == 2
    assert (got[1]["labels"][0] == train[6]["labels"]).all()


def test_entropy_with_and_without_a_card(prepared, tmp_path):
    size = SentencePieceTokenizer.load(prepared.tokenizer).vocab_size
    bare = tmp_path / "bare"
    copy(prepared.valid, bare)
    with_card = validation_entropy(DataPaths(train=(prepared.train,), valid=(prepared.valid,)), size)
    without = validation_entropy(DataPaths(train=(prepared.train,), valid=(str(bare),)), size)
    assert without == pytest.approx(with_card, abs=1e-12)


@pytest.mark.parametrize("given", ["95,5,0", "95,5", "9", "0.5,0.25,0.25", "100,0,0"])
def test_splits_are_read_as_megatron_reads_them(given):
    assert normalize(parse_split(given)) == parse_and_normalize_split(given)


@pytest.mark.parametrize("given", ["a", "a b", "a b c", "1 a", "0.3 a 0.7 b", "0.3 a b c", "1 2", "1 a 2"])
def test_blends_are_read_as_megatron_reads_them(given):
    assert parse_blend(given.split()) == get_blend_from_list(given.split())
