# SPDX-License-Identifier: Apache-2.0
"""What is on the disk: which checkpoint is used, which are removed, and that no pickled code is run."""

import errno
import json
import os
import pickle
import time
from enum import Enum

import pytest
import torch

from sparsek_megatron.errors import UserError
from sparsek_megatron.training import writer as writer_module
from sparsek_megatron.training.checkpoint import safe_load
from sparsek_megatron.training.manifest import check_contents, check_sizes
from sparsek_megatron.training.parallel import Machine
from sparsek_megatron.training.reshard import SavedState, cut_shard, merge_shards
from sparsek_megatron.training.run_folder import candidates, latest_step, newest_complete
from sparsek_megatron.training.snapshot import Snapshotter
from sparsek_megatron.training.writer import CheckpointWriter


def writer(root, keep_last_n=0) -> CheckpointWriter:
    machine = Machine(0, 1, torch.device("cpu"), torch.distributed.HashStore())
    return CheckpointWriter(root, machine, keep_last_n=keep_last_n, read_back=True, timeout_seconds=10)


def write(root, *steps: int, keep_last_n: int = 0, state=None) -> CheckpointWriter:
    each = writer(root, keep_last_n)
    for step in steps:
        each.folder(step).mkdir()
        (each.folder(step) / "run.json").write_text(f'{{"step": {step}}}')
        files = {"a.pt": {"step": step, "weights": torch.arange(1000)} if state is None else state}
        each.begin(step, files, ready=lambda: None)
        each.finish()
    return each


def steps(root) -> list[int]:
    return sorted(int(path.name[5:]) for path in root.glob("step_*"))


def test_a_checkpoint_is_whole_and_named_by_latest(tmp_path):
    news = write(tmp_path, 3).news()
    assert len(news) == 1 and "step 3: saved" in news[0]
    folder = tmp_path / "step_00000003"
    assert check_sizes(folder) is None and check_contents(folder) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000003"]
    assert safe_load(folder / "a.pt")["step"] == 3
    assert latest_step(tmp_path) == 3


@pytest.mark.parametrize("harm", ["flip", "cut", "grow", "remove", "manifest", "settings"])
def test_every_kind_of_damage_is_found_and_the_one_before_used(tmp_path, harm, capsys):
    write(tmp_path, 3, 6)
    names = {"manifest": "manifest.json", "settings": "run.json"}
    file = tmp_path / "step_00000006" / names.get(harm, "a.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    if harm == "remove":
        file.unlink()
    else:
        changed = {"cut": content[:-7], "grow": content + b"x", "manifest": content[:-9]}
        file.write_bytes(changed.get(harm, content))
    problem = check_sizes(file.parent) or check_contents(file.parent)
    assert problem is not None and file.name in problem
    if harm != "flip":  # sizes do not tell; the settings are looked at before all else is read
        assert newest_complete(tmp_path)[0] == 3
        assert latest_step(tmp_path) == 3 and "it is passed over" in capsys.readouterr().err


def test_the_checkpoints_to_try_begin_at_latest(tmp_path):
    write(tmp_path, 3, 6, 9)
    (tmp_path / "latest").write_text("step_00000006")
    assert candidates(tmp_path) == ([6, 3], None)
    (tmp_path / "latest").write_bytes(b"\xff")
    found, problem = candidates(tmp_path)
    assert found == [9, 6, 3] and "damaged" in problem
    (tmp_path / "latest").unlink()
    assert candidates(tmp_path)[0] == [9, 6, 3]
    assert candidates(tmp_path / "absent") == ([], None)


def test_the_newest_are_kept_and_those_of_a_trajectory_given_up_are_put_aside(tmp_path):
    write(tmp_path, 3, 6, 9, 12, keep_last_n=3)
    assert steps(tmp_path) == [6, 9, 12]
    write(tmp_path, 15, keep_last_n=5)
    assert steps(tmp_path) == [6, 9, 12, 15]
    news = write(tmp_path, 7, keep_last_n=1).news()  # resumed from 6, say
    assert steps(tmp_path) == [7] and latest_step(tmp_path) == 7
    aside = [tmp_path / f"given_up_step_000000{step:02d}" for step in (9, 12, 15)]
    assert all(check_sizes(path) is None and check_contents(path) is None for path in aside)
    assert len(news) == 4 and f"step_00000009: of a trajectory that was given up; it is {aside[0]} now" in news[0]
    write(tmp_path, 9, keep_last_n=1, state={"new": 1})
    assert steps(tmp_path) == [9] and safe_load(tmp_path / "step_00000009" / "a.pt") == {"new": 1}
    write(tmp_path, 8, keep_last_n=1)
    assert steps(tmp_path) == [8] and safe_load(aside[0] / "a.pt") == {"new": 1}
    assert sorted(tmp_path.iterdir()) == [*aside, tmp_path / "latest", tmp_path / "step_00000008"]


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_a_trajectory_given_up_is_not_resumed_when_latest_is_lost(tmp_path, harm):
    write(tmp_path, 3, 6, 9)
    (tmp_path / "latest").write_text("step_00000003")
    write(tmp_path, 5)
    (tmp_path / "latest").unlink() if harm == "missing" else (tmp_path / "latest").write_bytes(b"\xff")
    assert candidates(tmp_path)[0] == [5, 3]


def test_a_kill_between_putting_aside_and_publishing_loses_nothing(tmp_path, monkeypatch):
    write(tmp_path, 3, 6, 9)
    (tmp_path / "latest").write_text("step_00000006")
    monkeypatch.setattr(writer_module, "publish", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(UserError, match="the checkpoint of step 6 is intact"):
        write(tmp_path, 7, keep_last_n=1)
    assert steps(tmp_path) == [3, 6] and (tmp_path / "given_up_step_00000009" / "a.pt").is_file()


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    write(tmp_path, 3)
    broken = writer(tmp_path, keep_last_n=1)
    broken.folder(6).mkdir()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    broken.begin(6, {"a.pt": {}}, ready=lambda: None)
    with pytest.raises(UserError, match=r"step 6 not written: .*No space left.*checkpoint of step 3 is intact"):
        broken.finish()
    assert steps(tmp_path) == [3] and (tmp_path / "latest").read_text() == "step_00000003"
    assert not list(tmp_path.glob(".partial-*"))


def test_a_pipe_that_may_not_grow_is_used_as_it_is(tmp_path, monkeypatch):
    """Past /proc/sys/fs/pipe-user-pages-soft a process without CAP_SYS_RESOURCE is refused."""

    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(writer_module.fcntl, "fcntl", refuse)
    write(tmp_path, 3)
    assert steps(tmp_path) == [3] and check_contents(tmp_path / "step_00000003") is None


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_what_was_half_written_is_removed_when_no_rank_writes_any_more(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "_numbers", iter([0]))
    store = torch.distributed.HashStore()
    machine = Machine(0, 2, torch.device("cpu"), store)
    first = CheckpointWriter(tmp_path, machine, keep_last_n=0, read_back=True, timeout_seconds=10)
    first.folder(3).mkdir()
    first.begin(3, {"no/such/folder.pt": {}}, ready=lambda: None)
    while not store.check(["checkpoint_0/0"]):  # the first rank has failed
        time.sleep(0.01)
    time.sleep(0.1)
    (first.folder(3) / "of_the_second_rank.pt").write_bytes(b"still being written")
    store.set("checkpoint_0/1", json.dumps({"files": {}}))
    with pytest.raises(UserError, match=r"checkpoint of step 3 not written: .*there is no earlier checkpoint"):
        first.finish()
    assert not list(tmp_path.iterdir())


def test_no_pickled_code_is_run(tmp_path):
    torch.save({"module": Malicious(tmp_path / "run")}, tmp_path / "bad.pt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        safe_load(tmp_path / "bad.pt")
    assert not (tmp_path / "run").exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert (tmp_path / "run").exists(), "the file would have run its code"


class _Stage(int, Enum):
    FIRST = 1

    def __reduce_ex__(self, protocol):
        return getattr, (type(self), self.name)  # as Python before 3.11.4 pickles a member


def test_a_snapshot_holds_values_in_place_of_enumerations(tmp_path):
    torch.save({"stage": _Stage.FIRST}, tmp_path / "as_it_is.pt")
    with pytest.raises(pickle.UnpicklingError, match="getattr"):
        safe_load(tmp_path / "as_it_is.pt")
    torch.save(Snapshotter(torch.device("cpu")).take("x", {"stage": [_Stage.FIRST]}), tmp_path / "snapshot.pt")
    assert safe_load(tmp_path / "snapshot.pt") == {"stage": [1]}


def test_a_snapshot_is_apart_from_what_it_was_taken_of():
    weight = torch.ones(3)
    state = {"a": weight, "b": [weight, (weight[1:], 5)], "c": "x"}
    snapshots = Snapshotter(torch.device("cpu"))
    taken = snapshots.take("file", state)
    weight.zero_()
    assert torch.equal(taken["a"], torch.ones(3)) and torch.equal(taken["b"][1][0], torch.ones(2))
    assert taken["b"][0] is taken["a"] and taken["b"][1][1] == 5 and taken["c"] == "x"
    buffer = taken["a"].data_ptr()
    assert snapshots.take("file", state)["a"].data_ptr() == buffer, "the next one reuses the memory"


@pytest.mark.parametrize(("dim", "stride"), [(None, 1), (0, 1), (0, 2), (1, 1)])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 2), (2, 1), (2, 4)])
def test_shards_move_between_tensor_parallel_sizes(dim, stride, before, after):
    whole = torch.randn(16, 8)
    shards = [cut_shard(whole, dim, stride, rank=rank, size=before) for rank in range(before)]
    again = merge_shards(shards, dim, stride)
    assert torch.equal(again, whole)
    if stride == 2:  # rank 0 of 2 holds the first half of the gates and of the ups
        gates, ups = whole.chunk(2)
        assert torch.equal(cut_shard(whole, 0, 2, rank=0, size=2), torch.cat([gates[:4], ups[:4]]))
    assert sum(cut_shard(again, dim, stride, rank=r, size=after).numel() for r in range(after)) == (
        whole.numel() * (after if dim is None else 1)
    )


@pytest.mark.parametrize(("ranks", "said"), [((), "0 of 1"), (((0, 0), (1, 1)), "2 of 4")])
def test_optimizer_state_that_is_not_there_is_counted(tmp_path, ranks, said):
    for data, tensor in ranks:
        (tmp_path / f"zero_pp_rank_{data}_mp_rank_{tensor:02d}_optim_states.pt").touch()
    with pytest.raises(RuntimeError, match=f"it has {said} files of optimizer state"):
        SavedState(tmp_path, load_file=safe_load)


def test_the_manifest_is_json_with_sizes_and_checksums(tmp_path):
    write(tmp_path, 3)
    files = json.loads((tmp_path / "step_00000003" / "manifest.json").read_text())["files"]
    assert set(files) == {"a.pt", "run.json"} and len(files["a.pt"]["sha256"]) == 64
    assert files["a.pt"]["bytes"] == (tmp_path / "step_00000003" / "a.pt").stat().st_size
