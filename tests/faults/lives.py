# SPDX-License-Identifier: Apache-2.0
"""A training run that is killed again and again, and what must hold after each of its lives."""

import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from programs import REPOSITORY, Prepared, environment, kill_all

from sparsek_megatron.training.manifest import check_contents, check_sizes
from sparsek_megatron.training.report import METRICS, read_metrics
from sparsek_megatron.training.run_folder import RUN, candidates, checkpoint_name, newest_complete
from sparsek_megatron.training.watchdog import EXIT_HANG

LAYOUT = "--nproc-per-node 2 --tensor-model-parallel-size 2 --sequence-parallel --zero-stage 1"
LONGEST_SECONDS = 900


class Violation(AssertionError):
    """Something that must hold after a fault does not."""


def require(condition: object, what: str, evidence: str = "") -> None:
    """Raise `Violation` unless `condition`; `evidence` is what the program printed."""
    if not condition:
        raise Violation(f"{what}\n{evidence[-4000:]}")


def flags(prepared: Prepared, save: Path, *, steps: int, save_interval: int, layout: str = LAYOUT) -> list[str]:
    """The run of a campaign: a tiny model, a validation now and then, three checkpoints kept."""
    own = f"--train-iters {steps} --save-interval {save_interval} --eval-interval 50 --eval-iters 1 --keep-last-n 3 "
    own += "--log-interval 50"
    return [*prepared.flags(save), "--load", str(save), *layout.split(), *own.split()]


def start(arguments: list[str], log: Path, *, fault: str | None = None) -> subprocess.Popen:
    """Start the pretraining program, with a `fault` of `program.py` in it."""
    program = [str(REPOSITORY / "examples" / "pretrain_gpt.py")]
    if fault:
        program = [str(Path(__file__).with_name("program.py")), fault]
    with open(log, "w") as stream:
        return subprocess.Popen(
            [sys.executable, *program, *arguments], env=environment(), stdout=stream, stderr=subprocess.STDOUT
        )


def wait(process: subprocess.Popen, log: Path, *, seconds: float = LONGEST_SECONDS) -> str:
    """Wait for a program to end by itself; what it printed. A hang is a violation."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise Violation(f"hang: the run did not end within {seconds:.0f} s\n{log.read_text()[-4000:]}") from None
    return log.read_text()


def records(save: Path, *, after: int = 0) -> list[dict]:
    """What the run has logged about steps after `after`: losses, norms and rates to the last bit."""
    return [record for record in read_metrics(save) if record["step"] > after]


@dataclass
class Campaign:
    """Lives of one run, checked against an uninterrupted one."""

    prepared: Prepared
    folder: Path
    steps: int
    save_interval: int = 2
    seed: int = 0
    tally: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.save = self.folder / "killed"
        self.good = 0
        self.reference: list[dict] = []

    def run_uninterrupted(self) -> None:
        """The run that every other one must equal."""
        save, log = self.folder / "straight", self.folder / "straight.log"
        process = start(flags(self.prepared, save, steps=self.steps, save_interval=self.save_interval), log)
        said = wait(process, log)
        require(process.returncode == 0, "the uninterrupted run failed", said)
        self.reference = records(save)

    def live_and_die(self, number: int) -> None:
        """One life: start (or resume), die at a random instant of a random kind."""
        log = self.folder / f"life{number}.log"
        process = start(flags(self.prepared, self.save, steps=self.steps, save_interval=self.save_interval), log)
        kind = self.random.choice(["any time", "training", "writing", "writing", "publishing"])
        if not self._await(kind, process):
            said = wait(process, log)
            require(process.returncode == 0, f"life {number} failed before it was killed", said)
            kind = "too late"
        elif self.random.random() < 0.25 and (workers := psutil.Process(process.pid).children()):
            kind += ", one rank"
            self.random.choice(workers).kill()
            wait(process, log, seconds=90)
        else:
            kill_all(process)
        self.tally[f"SIGKILL: {kind}"] += 1
        self.check(log.read_text())

    def _await(self, kind: str, process: subprocess.Popen) -> bool:
        """Wait for an instant of that kind; False if the run ended first."""
        deadline = time.monotonic() + LONGEST_SECONDS
        if kind == "any time":
            time.sleep(self.random.uniform(0.0, 12.0))
            return process.poll() is None
        begun = self.last_logged()
        enough = begun + self.random.randint(1, 2 * self.save_interval)
        present = set(self.save.glob("step_*"))
        while process.poll() is None:
            require(time.monotonic() < deadline, f"hang: no {kind} within {LONGEST_SECONDS} s")
            if kind == "training" and self.last_logged() >= enough:
                time.sleep(self.random.uniform(0.0, 0.05))
                return True
            if kind == "writing" and self.last_logged() > begun and list(self.save.glob(".partial-*")):
                time.sleep(self.random.uniform(0.0, 0.04))
                return True
            if kind == "publishing" and set(self.save.glob("step_*")) - present:
                time.sleep(self.random.uniform(0.0, 0.002))
                return True
            time.sleep(0.002)
        return False

    def last_logged(self) -> int:
        return max((record["step"] for record in read_metrics(self.save)), default=0)

    def check(self, said: str) -> None:
        """Nothing lost, nothing torn, and every number so far the uninterrupted run's."""
        step, _ = newest_complete(self.save) if self.save.is_dir() else (None, [])
        require((step or 0) >= self.good, f"a checkpoint was lost: step {self.good} was good, now {step}", said)
        if step:
            problem = check_contents(self.save / checkpoint_name(step))
            require(problem is None, f"a published checkpoint is damaged: {problem}", said)
        self.good = step or 0
        found = records(self.save)
        require(found == self.reference[: len(found)], "losses differ from the uninterrupted run's", said)

    def tear(self) -> None:
        """Leave what a kill in the middle of writing a checkpoint and a line of the log leaves."""
        partial = self.save / f".partial-{checkpoint_name(self.good + self.save_interval)}"
        partial.mkdir(exist_ok=True)
        (partial / "mp_rank_00_model_states.pt").write_bytes(b"torn")
        with open(self.save / METRICS, "a") as stream:
            stream.write('{"step": 7, "lo')

    def damage(self, kind: str) -> None:
        """Damage the newest checkpoint (or `latest`): the next life must name it and use the one before."""
        # Those up to `latest`: a kill may have left one that was renamed and not yet named.
        names = sorted(checkpoint_name(step) for step in candidates(self.save)[0])
        newest = self.save / names[-1]
        intact = [name for name in names if check_sizes(self.save / name) is None]
        require(len(intact) >= 2, "not enough checkpoints to damage one")
        file = self.random.choice([path for path in sorted(newest.iterdir()) if path.suffix in (".pt", ".json")])
        if kind == "bit flip in the settings":
            file = newest / RUN
        content = bytearray(file.read_bytes())
        expected = int(names[-2][5:])
        if kind.startswith("bit flip"):
            position = self.random.randrange(8 * len(content))
            content[position // 8] ^= 1 << position % 8
            file.write_bytes(content)
            # A flipped bit of white space in the manifest changes nothing that it says.
            harmless = check_sizes(newest) is None and check_contents(newest) is None
            expected = int(names[-1][5:]) if harmless else expected
        elif kind == "truncation":
            file.write_bytes(content[: self.random.randrange(len(content))])
        elif kind == "missing file":
            file.unlink()
        else:
            (self.save / "latest").write_bytes(b"\xff\xfe")
            expected = candidates(self.save)[0][0]  # all are tried then
        self.good = expected
        log = self.folder / "damaged.log"
        arguments = flags(self.prepared, self.save, steps=self.steps, save_interval=self.save_interval)
        ahead = expected + self.save_interval
        process = start([*arguments, "--exit-interval", str(ahead)], log)
        said = wait(process, log)
        require(process.returncode == 0, f"no resume after a {kind} of {file.name}", said)
        require(f"from step {expected}" in said, f"resumed elsewhere than step {expected} after a {kind}", said)
        if expected < int(names[-1][5:]) or kind == "damaged latest":
            require("it is passed over" in said, f"a {kind} of {file.name} was not named", said)
        self.tally[f"damage: {kind}"] += 1
        self.check(said)

    def hang(self, timeout: float = 6.0) -> None:
        """A life in which rank 1 stops making progress: the watchdog must name it and end the run in time."""
        step = self.good + 4
        log = self.folder / "hangs.log"
        arguments = flags(self.prepared, self.save, steps=self.steps, save_interval=self.save_interval)
        fault = f"hang@1:{step}:{step}"
        process = start([*arguments, "--hang-timeout-seconds", str(timeout)], log, fault=fault)
        deadline = time.monotonic() + LONGEST_SECONDS
        while self.last_logged() < step - 1:
            alive = time.monotonic() < deadline and process.poll() is None
            require(alive, f"the run did not get to step {step - 1}", log.read_text())
            time.sleep(0.05)
        begun = time.monotonic()
        said = wait(process, log, seconds=timeout + 90)
        # The launcher gives the other rank up to half a minute to end.
        require(time.monotonic() - begun < timeout + 60, "the watchdog took too long", said)
        require(process.returncode == 1 and "no progress for" in said, "a hanging rank was not named", said)
        require(f"exit code {EXIT_HANG}" in said and f"in step {step}" in said, "the watchdog did not say where", said)
        self.tally["hanging rank: ended by the watchdog"] += 1
        self.check(said)

    def finish(self) -> None:
        """The last life runs to the end and must have followed the uninterrupted run all along."""
        log = self.folder / "last.log"
        process = start(flags(self.prepared, self.save, steps=self.steps, save_interval=self.save_interval), log)
        said = wait(process, log)
        require(process.returncode == 0, "the last life failed", said)
        require(records(self.save) == self.reference, "losses differ from the uninterrupted run's", said)
        require(not list(self.save.glob(".partial-*")), "a half-written checkpoint was left", said)
        self.tally["runs whose every loss is bitwise the uninterrupted run's"] += 1
