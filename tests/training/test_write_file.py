# SPDX-License-Identifier: Apache-2.0
"""The process that brings one file of a checkpoint to the disk."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from sparsek_megatron.training import write_file, writer
from sparsek_megatron.training.manifest import record_of

STATE = {"weight": torch.randn(1 << 20), "step": 7, "small": [torch.arange(3), torch.zeros(0)]}


def test_the_file_holds_what_was_saved_and_the_record_is_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    assert writer._write(path, STATE, read_back=True) == record_of(path)
    loaded = torch.load(path, weights_only=True)
    assert torch.equal(loaded["weight"], STATE["weight"]) and loaded["step"] == 7


def test_a_full_disk_is_the_error_that_it_is() -> None:
    with pytest.raises(OSError) as caught:
        writer._write(Path("/dev/full"), STATE, read_back=True)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == "/dev/full"


def test_a_missing_folder_and_a_state_that_does_not_pickle_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        writer._write(tmp_path / "absent" / "state.pt", STATE, read_back=True)
    with pytest.raises(Exception, match="pickle"):
        writer._write(tmp_path / "state.pt", {"weight": STATE["weight"], "function": lambda: None}, read_back=True)


@pytest.mark.parametrize("read_back", [True, False])
def test_what_reads_back_differently_is_refused(tmp_path: Path, read_back: bool) -> None:
    command = [sys.executable, "-I", "-S", "-c", _ON_A_FAILING_DISK, write_file.__file__, str(tmp_path / "f")]
    command += [str(os.getpid()), *(["--read-back"] if read_back else [])]
    process = subprocess.run(command, input=b"abc", stdout=subprocess.PIPE, check=True)
    assert (b"f reads back other than it was written" in process.stdout) == read_back


_ON_A_FAILING_DISK = """
import runpy, sys
del sys.argv[0]
main = runpy.run_path(sys.argv[0])["main"]
main.__globals__["size_and_sha256"] = lambda path: (3, "0" * 64)
main()
"""


def test_an_input_that_was_cut_off_by_the_parents_end_has_no_answer(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-I", "-S", write_file.__file__, str(tmp_path / "state.pt"), str(os.getpid() + 1)],
        input=b"abc", stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    assert process.stdout == b""


def writing(path: Path, state: object, number: int) -> tuple[list[object], int]:
    """(The record, or the error, of `state` written by a thread like the writer's; how often its process was there to
    be sent signal `number`.)"""
    ended: list[object] = []

    def write() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # as the writer's thread does
        try:
            ended.append(writer._write(path, state, read_back=True))
        except OSError as err:
            ended.append(err)

    thread = threading.Thread(target=write)
    thread.start()
    listed, sent = Path(f"/proc/self/task/{thread.native_id}/children"), 0
    while thread.is_alive():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in listed.read_text().split():
                os.kill(int(child), number)
                sent += 1
        time.sleep(0.01)
    thread.join()
    return ended, sent


LARGE = {str(i): torch.randn(1 << 22) for i in range(12)}  # 192 MiB: takes a while


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_that_end_a_run_do_not_end_the_writing(tmp_path: Path, number: int) -> None:
    """Slurm sends them to every process of a job."""
    path = tmp_path / "state.pt"
    ended, sent = writing(path, LARGE, number)
    assert sent and ended == [record_of(path)]


def test_a_process_that_is_killed_is_an_error(tmp_path: Path) -> None:
    (error,), _ = writing(tmp_path / "state.pt", LARGE, signal.SIGKILL)
    assert "the process that writes state.pt ended with code -9" in str(error)
