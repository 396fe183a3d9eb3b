# SPDX-License-Identifier: Apache-2.0
"""Faults with runs of their own: a full disk, and a rank whose loss is not a number."""

import contextlib
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lives import LAYOUT, flags, records, require, start, wait
from programs import Prepared

from sparsek_megatron.training.manifest import check_contents, check_sizes
from sparsek_megatron.training.run_folder import checkpoint_name

STEPS = 12
INTERVAL = 3
DATA_PARALLEL = "--nproc-per-node 2 --zero-stage 1 --global-batch-size 4"


def straight(prepared: Prepared, folder: Path, layout: str, *, steps: int = STEPS) -> list[dict]:
    """Records of the uninterrupted run."""
    save, log = folder / "straight", folder / "straight.log"
    said = wait(start(flags(prepared, save, steps=steps, save_interval=INTERVAL, layout=layout), log), log)
    require(len(records(save)) > steps, "the uninterrupted run failed", said)
    return records(save)


def in_force(save: Path) -> int:
    """The step that `latest` names."""
    return int((save / "latest").read_text().removeprefix("step_"))


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """A file system of that size at `folder`; yields False where mounting is not permitted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=False)


def full_disk(prepared: Prepared, folder: Path, tally: Counter) -> None:
    """The disk fills up under a run: it is named, the last good checkpoint stays, and with room the run goes on."""
    steps, interval = 36, 12
    wanted = straight(prepared, folder, LAYOUT, steps=steps)
    disk = folder / "disk"
    with small_disk(disk, 64) as mounted:
        if not mounted:
            tally["full disk: not tried, mounting a tmpfs is not permitted here"] += 1
            return
        save, log = disk / "run", folder / "full.log"
        arguments = flags(prepared, save, steps=steps, save_interval=interval)
        process = start([*arguments, "--exit-interval", str(interval)], log)
        said = wait(process, log)
        require(process.returncode == 0, "the run before the disk is full failed", said)
        checkpoint = sum(path.stat().st_size for path in (save / f"step_{interval:08d}").iterdir())
        process = start(arguments, log)
        # It looks for free space when it starts: the disk fills up after that.
        while not records(save, after=interval):
            require(process.poll() is None, "the resumed run failed", log.read_text())
            time.sleep(0.002)
        usage = os.statvfs(disk)
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(usage.f_bavail * usage.f_frsize - checkpoint // 2))
        said = wait(process, log)
        require(process.returncode == 2, f"exit code {process.returncode} on a full disk", said)
        errors = [line for line in said.splitlines() if line.startswith("error:")]
        # The checkpoint or, once that has taken the last byte, the log.
        require(len(errors) == 1 and "No space left on device" in errors[0], "not named in one line", said)
        good = save / checkpoint_name(in_force(save))
        problem = check_sizes(good) or check_contents(good)
        require(problem is None, f"the checkpoint in force is damaged: {problem}", said)
        ballast.unlink()
        process = start(arguments, log)
        said = wait(process, log)
        require(process.returncode == 0 and records(save) == wanted, "the run did not go on bitwise", said)
    tally["full disk: named, nothing lost, resumed bitwise"] += 1


def nan_rank(prepared: Prepared, folder: Path, tally: Counter) -> None:
    """One rank's loss is NaN: such steps are skipped on all ranks; too many end the run, and it resumes."""
    wanted = straight(prepared, folder, DATA_PARALLEL)
    save, log = folder / "skips", folder / "skips.log"
    arguments = flags(prepared, save, steps=STEPS, save_interval=INTERVAL, layout=DATA_PARALLEL)
    process = start(arguments, log, fault="nan@1:5:6")
    said = wait(process, log)
    require(process.returncode == 0, "two bad steps ended the run", said)
    require("step 5: skipped" in said and "(the loss of rank 1 is not finite); 1 in a row" in said, "not named", said)
    require("no checkpoint after a skipped step" in said, "a checkpoint was written after a bad step", said)
    found = [record for record in records(save) if "loss" in record]
    require([r["step"] for r in found if r["loss"] is None] == [5, 6] and len(found) == STEPS, "wrong steps", said)
    tally["NaN rank: step skipped and reported, run goes on"] += 1

    save, log = folder / "ends", folder / "ends.log"
    arguments = flags(prepared, save, steps=STEPS, save_interval=INTERVAL, layout=DATA_PARALLEL)
    process = start([*arguments, "--max-skipped-steps", "2"], log, fault="nan@1:5:100")
    said = wait(process, log)
    require(process.returncode == 2 and "in 3 steps in a row" in said, "the limit did not end the run", said)
    require(in_force(save) == INTERVAL, "the last good checkpoint is not in force", said)
    process = start(arguments, log)
    said = wait(process, log)
    require(process.returncode == 0 and records(save) == wanted, "the run did not go on bitwise", said)
    tally["NaN rank: limit ends the run, resumed bitwise"] += 1
