# SPDX-License-Identifier: Apache-2.0
"""A run that is stopped and resumed is bitwise the run that was not, over TP=2, sequence parallelism and ZeRO-1.

Runs that are killed are in tests/faults.
"""

import json
import os
import resource
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from programs import Prepared, finish, run, start, start_code, start_script

from sparsek_megatron.data.fingerprint import fingerprint
from sparsek_megatron.training.arguments import parse
from sparsek_megatron.training.manifest import check_contents, check_sizes, record_of, write_manifest
from sparsek_megatron.training.report import read_metrics
from sparsek_megatron.training.run_folder import changed_settings

PARALLEL = ["--nproc-per-node", "2", "--tensor-model-parallel-size", "2", "--sequence-parallel"]


def train(prepared: Prepared, save: Path, *more: str, **options) -> str:
    return run("pretrain_gpt.py", *prepared.flags(save), "--load", str(save), *PARALLEL, *more, **options)


def trajectory(save: Path) -> list[dict]:
    """Every record of the run, in order: losses, learning rates and gradient norms to the last bit."""
    return read_metrics(save)


def wait_for_step(save: Path, step: int, process) -> None:
    """Until the run has logged that step."""
    deadline = time.monotonic() + 200
    while not any(r["step"] >= step for r in read_metrics(save)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory) -> Path:
    save = tmp_path_factory.mktemp("uninterrupted")
    said = train(prepared, save)
    assert "2 x CPU: gloo, torch kernels, fp32, TP=2 with sequence parallelism, CP=1, DP=1, ZeRO-1" in said
    assert "step 8: validation loss" in said and "unigram entropy" in said and "tokens/s" in said
    return save


def test_a_run_leaves_what_it_promises(uninterrupted):
    steps = [r["step"] for r in trajectory(uninterrupted) if "loss" in r]
    assert steps == list(range(1, 9))
    assert [r["step"] for r in trajectory(uninterrupted) if "valid_loss" in r] == [0, 4, 8]
    assert (uninterrupted / "latest").read_text() == "step_00000008"
    assert sorted(p.name for p in uninterrupted.glob("*step_*")) == [f"step_0000000{n}" for n in (3, 6, 8)]
    assert (uninterrupted / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((uninterrupted / "tensorboard").glob("events.*"))
    losses = [r["loss"] for r in trajectory(uninterrupted) if "loss" in r]
    assert losses[-1] < losses[0]
    health = {r["step"]: r["health"] for r in read_metrics(uninterrupted, health=True) if "health" in r}
    assert [step for step, each in health.items() if each.get("checkpoint_waited", 0.0) > 0] == [4, 7]
    assert [step for step, each in health.items() if "started" in each] == [1]


def test_a_signal_ends_the_run_after_a_checkpoint(prepared, uninterrupted, tmp_path):
    save = tmp_path / "stopped"
    process = start("pretrain_gpt.py", *prepared.flags(save), "--load", str(save), *PARALLEL)
    wait_for_step(save, 1, process)
    while process.poll() is None:  # also while the last checkpoint is being written, and until every process has ended
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.02)
    said = finish(process)
    stopped = int((save / "latest").read_text()[5:])
    assert f"stopped by SIGUSR1 after step {stopped}" in said and stopped < 8, said
    assert f"from step {stopped}" in train(prepared, save)
    assert [r for r in trajectory(save) if "loss" in r] == [r for r in trajectory(uninterrupted) if "loss" in r]


def test_signals_to_every_process_end_a_run_with_data_workers_after_a_checkpoint(prepared, tmp_path):
    save = tmp_path / "stopped"
    flags = [*prepared.flags(save), "--num-workers", "2", "--train-iters", "1000", "--save-interval", "1000"]
    process = start("pretrain_gpt.py", *flags, start_new_session=True)
    wait_for_step(save, 1, process)
    while process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.02)
        os.killpg(process.pid, signal.SIGUSR1)
    said = finish(process)
    stopped = int((save / "latest").read_text()[5:])
    assert f" after step {stopped}; with --load" in said.partition("stopped by SIG")[2], said
    assert "Traceback" not in said and "DataLoader" not in said, said
    assert [p.name for p in save.glob("*step_*")] == [f"step_{stopped:08d}"]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


# Each case is a process with a group of its own; prints its exit code, and whether it has left a process behind.
WITH_WORKERS = """
import contextlib, multiprocessing, os, signal, subprocess, sys, time
from sparsek_megatron.stop_signals import SIGNALS, hold_signals
from sparsek_megatron.training.stopping import StopRequest
hold_signals()
from torch.utils.data import Dataset
from sparsek_megatron.data.datasets import StepSampler, batches

class Numbers(Dataset):
    def __getitem__(self, index):
        return {"tokens": index}

def reading():
    sampler = StepSampler(
        first_sample=0, last_sample=50, micro_batch_size=1, global_batch_size=1, rank=0, world_size=1
    )
    return batches(Numbers(), sampler, num_workers=2, pin=False)

def amid_signals():
    with StopRequest():
        for _ in range(3):
            given_up = reading()
            next(given_up)
            assert [int(batch["tokens"]) for batch in reading()] == list(range(50))

def by_an_exception_with_a_signal_pending():
    data = reading()
    next(data)
    workers = " ".join(str(worker.pid) for worker in multiprocessing.active_children())
    subprocess.run(f"kill -STOP {workers}; sleep 0.1; kill -TERM {workers}", shell=True, check=True)
    subprocess.Popen(f"sleep 0.3; kill -CONT {workers}", shell=True, start_new_session=True)
    raise ValueError("its own error")

for case in (amid_signals, by_an_exception_with_a_signal_pending):
    if not (pid := os.fork()):
        case()
        sys.exit(0)
    os.setpgid(pid, pid)
    deadline = time.monotonic() + 20
    while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
        for number in SIGNALS if case is amid_signals else ():
            os.killpg(pid, number)
        time.sleep(0.001)
    code = os.waitstatus_to_exitcode(ended[1]) if ended[0] else "hangs"
    left = "nothing"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
        left = "processes"
    print(f"ended {case.__name__}: {code}, {left} left", flush=True)  # the next fork must not take it along
"""


def test_data_workers_outlive_signals_to_every_process_and_end_with_their_own():
    said = finish(start_code(WITH_WORKERS))
    assert [line.removeprefix("ended ") for line in said.splitlines() if line.startswith("ended ")] == [
        "amid_signals: 0, nothing left",
        "by_an_exception_with_a_signal_pending: 1, nothing left",
    ], said
    assert said.count("Traceback") == said.count("ValueError: its own error") == 1, said


def wait_until_held(process) -> None:
    """Until the program has seen to it that SIGUSR1 does not end it: the first thing that it does."""
    for _ in range(1000):
        status = Path(f"/proc/{process.pid}/status").read_text()
        masks = (int(status.partition(name)[2].split()[0], 16) for name in ("SigBlk:", "SigCgt:"))
        if any(mask >> (signal.SIGUSR1 - 1) & 1 for mask in masks):
            return
        time.sleep(0.002)
    raise AssertionError(finish(process))


@pytest.mark.parametrize("launcher", ["examples/pretrain_gpt.py", "launch/torchrun.sh"])
def test_a_signal_while_it_starts_ends_the_run_before_its_first_step(prepared, uninterrupted, tmp_path, launcher):
    save = copy_at(uninterrupted, tmp_path / "started", 3)
    flags = [*prepared.flags(save), "--load", str(save), *PARALLEL[2:]]
    if launcher.endswith(".py"):
        process = start("pretrain_gpt.py", *flags, *PARALLEL[:2])
    else:
        process = start_script(launcher, "examples/pretrain_gpt.py", *flags, NPROC_PER_NODE="2")
    wait_until_held(process)
    process.send_signal(signal.SIGUSR1)
    said = finish(process)
    assert "stopped by SIGUSR1 before step 4; the same command goes on there" in said and "error" not in said, said
    assert (save / "latest").read_text() == "step_00000003" and not list(save.glob("*step_00000004"))


def copy_at(uninterrupted: Path, folder: Path, step: int) -> Path:
    """The uninterrupted run as it was after its checkpoint of `step`."""
    shutil.copytree(uninterrupted, folder)
    for later in folder.glob("step_*"):
        if int(later.name[5:]) > step:
            shutil.rmtree(later)
    (folder / "latest").write_text(f"step_{step:08d}")
    return folder


def test_exit_interval_saves_and_leaves_and_old_checkpoints_go(prepared, uninterrupted, tmp_path):
    save = tmp_path / "left"
    train(prepared, save, "--exit-interval", "4", "--keep-last-n", "1")
    assert [p.name for p in save.glob("step_*")] == ["step_00000004"]
    assert trajectory(save) == [r for r in trajectory(uninterrupted) if r["step"] <= 4]


def test_a_run_without_validation_needs_no_such_data_and_trains_alike(prepared, uninterrupted, tmp_path):
    save = tmp_path / "training alone"
    flags = [*prepared.flags(save), *PARALLEL, "--eval-iters", "0", "--exit-interval", "5"]
    place = flags.index("--valid-data-path")
    run("pretrain_gpt.py", *flags[:place], *flags[place + 2 :])
    assert trajectory(save) == [r for r in trajectory(uninterrupted) if r["step"] <= 5 and "loss" in r]
    assert (save / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_left_as_it_is(prepared, uninterrupted, tmp_path):
    save = copy_at(uninterrupted, tmp_path / "finished", 8)
    before = {p: p.stat().st_mtime_ns for p in save.glob("step_*/*")}
    assert "already at step 8 of 8; nothing left to train" in train(prepared, save)
    assert {p: p.stat().st_mtime_ns for p in save.glob("step_*/*")} == before
    assert trajectory(save) == trajectory(uninterrupted)


def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(prepared, uninterrupted, tmp_path):
    save = copy_at(uninterrupted, tmp_path / "full", 3)
    largest = max(p.stat().st_size for p in save.glob("step_00000003/*"))

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))

    said = train(prepared, save, code=2, preexec_fn=small_disk)
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "checkpoint of step 6 not written" in errors[0], said
    assert "the checkpoint of step 3 is intact" in errors[0] and "Traceback" not in said
    assert (save / "latest").read_text() == "step_00000003"
    assert not list(save.glob("*step_00000006"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_resumed(prepared, uninterrupted, tmp_path):
    save = copy_at(uninterrupted, tmp_path / "damaged", 6)
    file = next((save / "step_00000006").glob("zero_pp_rank_0_mp_rank_01*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = train(prepared, save)
    assert f"{save / 'step_00000006'}: {file.name} is damaged (its checksum differs); it is passed over" in said
    assert said.count("warning: ") == 1  # the data is what it was
    assert f"resuming {save} from step 3" in said and "Traceback" not in said
    assert trajectory(save) == trajectory(uninterrupted)
    assert check_sizes(save / "step_00000006") is None and check_contents(save / "step_00000006") is None


def test_a_zero_1_checkpoint_of_another_number_type_is_resumed(prepared, uninterrupted, tmp_path):
    save = copy_at(uninterrupted, tmp_path / "other", 3)
    step = save / "step_00000003"
    for file in step.glob("zero_pp_rank_*"):  # as a run in bfloat16 names them
        file.rename(step / f"bf16_{file.name}")
    settings = json.loads((step / "run.json").read_text())
    (step / "run.json").write_text(json.dumps(settings | {"number_type": "bf16"}))
    write_manifest(step, {path.name: record_of(path) for path in step.iterdir() if path.name != "manifest.json"})
    assert f"resuming {save} from step 3" in train(prepared, save, "--exit-interval", "5")
    losses = [r["loss"] for r in trajectory(save) if "loss" in r]
    assert losses == pytest.approx([r["loss"] for r in trajectory(uninterrupted) if "loss" in r][:5], rel=1e-6)
    assert json.loads((save / "step_00000005" / "run.json").read_text())["number_type"] == "fp32"


def test_a_loss_that_is_no_number_stops_the_run(prepared, tmp_path):
    save = tmp_path / "nan"
    flags = [*prepared.flags(save), "--lr", "1e30", "--save-interval", "1", "--max-skipped-steps", "2"]
    said = run("pretrain_gpt.py", *flags, code=2)
    error = said.splitlines()[-1]
    assert error.startswith("error: step 4: the loss is ") and "stopped" in error and "--lr" in error, said
    assert "step 2: skipped, its gradient is not finite" in said and "1 in a row, limit 2" in said
    assert said.count("no checkpoint") == said.count("step 2: no checkpoint after a skipped step: the next good") == 1
    assert f"resume from {save} (step 1)" in error
    assert [r["grad_norm"] for r in trajectory(save) if "loss" in r][1:] == [None] * 3
    assert (save / "latest").read_text() == "step_00000001"


def test_text_is_generated_from_the_checkpoint(uninterrupted):
    flags = ["--load", str(uninterrupted), "--prompt", "import ", "--max-new-tokens", "8"]
    sample = run("generate.py", *flags)
    assert "\nimport " in sample and len(sample.split("\nimport ")[1]) > 1
    said = run("generate.py", *flags, "--max-new-tokens", "80", code=2)
    assert said.startswith("error: --max-new-tokens 80") and said.count("\n") == 1


def test_settings_that_change_the_curves_are_named_on_resuming(prepared, uninterrupted):
    same = [*prepared.flags(uninterrupted), "--load", str(uninterrupted)]
    assert changed_settings(parse(same)[0], 8) == []
    for flag, value in (("--adam-eps", "1e-06"), ("--sparsek-lr-mult", "2.0"), ("--weight-decay", "0.3")):
        (line,) = changed_settings(parse([*same, flag, value])[0], 8)
        assert line.startswith(f"note: {flag} was ") and f"now {value}: the run continues on another" in line
    (line,) = changed_settings(parse([*same, "--valid-data-path", prepared.train])[0], 8)
    assert line.startswith("note: --valid-data-path was ") and "validation losses from here on" in line
    no_validation = [*same, "--valid-data-path", prepared.train, "--eval-iters", "0"]
    (line,) = changed_settings(parse(no_validation)[0], 8)
    assert line == "note: --eval-iters was 2, now 0: nothing is validated from here on"


def test_data_that_changed_is_named_on_resuming_until_the_next_checkpoint(prepared, tmp_path):
    shutil.copytree(prepared.folder, tmp_path / "data")
    own, save = Prepared(tmp_path / "data"), tmp_path / "run"
    flags = [*own.flags(save), "--load", str(save), "--valid-data-path", prepared.valid]

    def warnings(exit_interval: int) -> list[str]:
        said = run("pretrain_gpt.py", *flags, "--exit-interval", str(exit_interval))
        return [line for line in said.splitlines() if "warning: --" in line]

    assert warnings(1) == []
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(prepared.valid + suffix, own.train + suffix)
    (line,) = warnings(2)
    assert line.startswith(f"warning: --train-data-path: changed since the checkpoint of step 1: {own.train} (.bin had")
    assert "from step 2 on samples are drawn in another order" in line
    assert warnings(3) == []


def test_settings_are_stored_with_the_checkpoint(prepared, uninterrupted):
    saved = json.loads((uninterrupted / "step_00000008" / "run.json").read_text())
    assert saved["step"] == 8 and saved["world_size"] == 2 and saved["settings"]["sparsek_topk"] == 8
    assert saved["number_type"] == "fp32"
    assert saved["data"] == {prefix: asdict(fingerprint(prefix)) for prefix in (prepared.train, prepared.valid)}
