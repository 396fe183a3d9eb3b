# SPDX-License-Identifier: Apache-2.0
"""The watchdog ends what hangs, says in what, and lets alone what takes long and makes progress."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from sparsek_megatron.training import loop, watchdog, writer
from sparsek_megatron.training.loop import Trainer
from sparsek_megatron.training.manifest import record_of
from sparsek_megatron.training.parallel import Machine
from sparsek_megatron.training.watchdog import EXIT_HANG, Watchdog
from sparsek_megatron.training.writer import CheckpointWriter

LIMIT = 1.0
PART = 0.2  # seconds that each of PARTS takes: all together they take longer than the limit
PARTS = 10


@pytest.fixture
def exits(monkeypatch):
    """Exit codes that the watchdog would have ended this process with."""
    codes = []
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    yield codes
    if watchdog._watching:
        watchdog._watching.close()
    for thread in threading.enumerate():
        if thread.name == "watchdog":
            thread.join()


class Engine:
    """Of DeepSpeed's engine what a step and a validation call."""

    def eval(self):
        pass

    train = eval

    def backward(self, _):
        pass


def trainer(monkeypatch, seconds: list[float]) -> Trainer:
    """One whose micro-batches, of steps and of validations, take so long each."""
    own = Trainer.__new__(Trainer)
    own.machine = Machine(0, 1, torch.device("cpu"), torch.distributed.HashStore())
    own.config = SimpleNamespace(eval_iters=len(seconds))
    own.engine, own.report, own._valid_set, own._micro_batches = Engine(), None, [], len(seconds)
    own.checkpoints = SimpleNamespace(before_update=lambda: None)
    own._selection = SimpleNamespace(arm=lambda: None, disarm=lambda: None)
    own._stop = SimpleNamespace(ask=lambda _: SimpleNamespace(item=lambda: 0))
    own._batches = lambda *_: iter(seconds)
    own._loss = lambda each: time.sleep(each) or torch.ones(())
    own._mean_over_ranks = lambda loss: loss
    own._watchdog = Watchdog(LIMIT, 0)
    monkeypatch.setattr(loop, "take_step", lambda _: 1.0)
    monkeypatch.setattr(loop, "name_of", lambda _: None)
    return own


def take_step(own: Trainer, seconds: list[float]) -> None:
    own._watchdog.beat("step 3")
    own._one_step(iter(seconds), look=False)


def test_a_step_of_many_micro_batches_may_take_longer_than_the_limit(monkeypatch, exits):
    seconds = [PART] * PARTS
    take_step(trainer(monkeypatch, seconds), seconds)
    assert not exits


def test_a_micro_batch_that_hangs_is_ended(monkeypatch, exits, capfd):
    seconds = [0.0, 2 * LIMIT, 0.0]
    take_step(trainer(monkeypatch, seconds), seconds)
    assert set(exits) == {EXIT_HANG} and "rank 0: no progress for 1 s in step 3; ending" in capfd.readouterr().err


def test_a_validation_of_many_batches_may_take_longer_than_the_limit(monkeypatch, exits):
    trainer(monkeypatch, [PART] * PARTS)._validate(0)
    assert not exits


def test_a_validation_that_hangs_is_ended_under_its_name(monkeypatch, exits, capfd):
    trainer(monkeypatch, [0.0, 2 * LIMIT])._validate(0)
    assert set(exits) == {EXIT_HANG} and "no progress for 1 s in the validation at step 0;" in capfd.readouterr().err


def checkpoint(tmp_path, monkeypatch, write, names=("a.pt",)) -> CheckpointWriter:
    """One under way, whose files `write` writes."""
    monkeypatch.setattr(writer, "_write", write)
    machine = Machine(0, 1, torch.device("cpu"), torch.distributed.HashStore())
    own = CheckpointWriter(tmp_path, machine, keep_last_n=0, read_back=False, timeout_seconds=60)
    own.folder(3).mkdir()
    own.begin(3, dict.fromkeys(names), ready=lambda: None)
    return own


def one_by_one(path, _, **options):
    time.sleep(PART)
    path.write_bytes(b"x")
    return record_of(path)


def bit_by_bit(path, _, **options):
    with open(path, "wb", buffering=0) as stream:
        for _ in range(PARTS):
            time.sleep(PART)
            stream.write(b"x")
    return record_of(path)


@pytest.mark.parametrize(
    ("write", "names"), [(one_by_one, tuple(f"{i}.pt" for i in range(PARTS))), (bit_by_bit, ("a.pt",))]
)
def test_files_that_end_or_grow_may_take_longer_than_the_limit(tmp_path, monkeypatch, exits, write, names):
    own = checkpoint(tmp_path, monkeypatch, write, names)
    Watchdog(LIMIT, 0).beat("writing the last checkpoint")
    own.finish()
    assert not exits and (tmp_path / "latest").read_text() == "step_00000003"


def test_a_file_that_is_read_back_may_take_longer_than_the_limit(tmp_path, monkeypatch, exits):
    """As the disk is slow, say; here the process that does it pauses now and then."""
    pausing = tmp_path / "pausing.py"
    pausing.write_text(f"""
import runpy, sys, time
sys.argv[0] = {writer.write_file.__file__!r}
main = runpy.run_path(sys.argv[0])["main"]
whole = main.__globals__["size_and_sha256"]

def slow(path):
    with open(path, "rb", buffering=0) as stream:
        for _ in range({PARTS}):
            time.sleep({PART})
            stream.read(1)
    return whole(path)

main.__globals__["size_and_sha256"] = slow
main()
""")
    monkeypatch.setattr(writer.write_file, "__file__", str(pausing))
    machine = Machine(0, 1, torch.device("cpu"), torch.distributed.HashStore())
    own = CheckpointWriter(tmp_path, machine, keep_last_n=0, read_back=True, timeout_seconds=60)
    own.folder(3).mkdir()
    own.begin(3, {"a.pt": {"step": 3}}, ready=lambda: None)
    time.sleep(0.5)  # the process has started
    Watchdog(LIMIT, 0).beat("writing the last checkpoint")
    own.finish()
    assert not exits and (tmp_path / "latest").read_text() == "step_00000003"


def test_a_rank_waits_for_anothers_files_while_those_grow_and_no_longer(tmp_path, monkeypatch, exits, capfd):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(writer, "_numbers", iter([0]))
    monkeypatch.setattr(writer, "_write", one_by_one)
    machine = Machine(0, 2, torch.device("cpu"), store)
    own = CheckpointWriter(tmp_path, machine, keep_last_n=0, read_back=False, timeout_seconds=60)
    own.folder(3).mkdir()
    own.begin(3, {"a.pt": None}, ready=lambda: None)
    ended_before_it_hung = []

    def other_rank():
        for _ in range(PARTS):  # as its `finish` says that its files grow
            time.sleep(PART)
            store.add("checkpoint_0/progress", 1)
        ended_before_it_hung.extend(exits)
        time.sleep(2 * LIMIT)
        store.set("checkpoint_0/1", '{"files": {}}')

    threading.Thread(target=other_rank).start()
    Watchdog(LIMIT, 0).beat("writing the last checkpoint")
    own.finish()
    assert not ended_before_it_hung and set(exits) == {EXIT_HANG}
    assert "in writing the last checkpoint;" in capfd.readouterr().err


def test_a_file_that_does_not_get_on_is_ended(tmp_path, monkeypatch, exits):
    own = checkpoint(tmp_path, monkeypatch, lambda path, _, **options: time.sleep(2.5 * LIMIT) or one_by_one(path, _))
    Watchdog(LIMIT, 0).beat("writing the last checkpoint")
    own.finish()
    assert set(exits) == {EXIT_HANG}
