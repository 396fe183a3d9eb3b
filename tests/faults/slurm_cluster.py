# SPDX-License-Identifier: Apache-2.0
"""A real Slurm of one machine, for the time of a test: munged, slurmctld and slurmd with files of their own."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

CPUS = 4  # that Slurm hands out, whatever the machine has
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
SlurmctldPort={control_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
SchedulerParameters=sched_interval=1,bf_interval=1
KillWait=10
MailProg=/bin/true
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class NotHere(Exception):
    """What this machine lacks for a Slurm: its programs, or root. Daemons that do not come up are an error."""


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start it, with `CPUS` cores and two partitions: jobs in `high` preempt those in `low`, the default one.

    Yields the environment in which sbatch and its like find it.

    Raises:
        NotHere: its programs are not installed, or need root.
        RuntimeError: a daemon did not come up; with their logs.
    """
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        raise NotHere(f"{', '.join(missing)} not installed (Debian and Ubuntu: apt install slurm-wlm munge)")
    if os.geteuid() != 0:
        raise NotHere("its daemons need root")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    configuration = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    configuration.write_text(
        CONFIGURATION.format(
            host=host, folder=folder, cpus=CPUS, control_port=_free_port(), node_port=_free_port()
        )
    )
    settings = {**os.environ, "PATH": _path(), "SLURM_CONF": str(configuration)}
    running: list[subprocess.Popen] = []

    def start(name: str, *command: str) -> None:
        stream = open(folder / f"{name}.out", "w")  # noqa: SIM115 - the daemon's until it ends
        running.append(subprocess.Popen(command, env=settings, stdout=stream, stderr=subprocess.STDOUT))

    try:
        if subprocess.run(["munge", "-n"], env=settings, capture_output=True).returncode != 0:
            subprocess.run(
                ["install", "-d", "-o", "munge", "-g", "munge", "-m", "755", "/run/munge"], check=True
            )
            start("munged", "runuser", "-u", "munge", "--", "munged", "--foreground", "--force")
        start("slurmctld", "slurmctld", "-D", "-i", "-f", str(configuration))
        start("slurmd", "slurmd", "-D", "-f", str(configuration), "-N", host)
        deadline = time.monotonic() + 30
        while (
            b"idle"
            not in subprocess.run(["sinfo", "-h", "-o", "%T"], env=settings, capture_output=True).stdout
        ):
            if time.monotonic() > deadline or any(process.poll() is not None for process in running):
                logs = "\n".join(path.read_text()[-600:] for path in sorted(folder.glob("*.[lo][ou][gt]")))
                raise RuntimeError(f"Slurm's daemons did not come up here:\n{logs}")
            time.sleep(0.3)
        yield settings
    finally:
        deadline = time.monotonic() + 30  # a job must not outlive its daemons
        while time.monotonic() < deadline:
            if not subprocess.run(["squeue", "-h"], env=settings, capture_output=True).stdout:
                break
            for options in (["--full", "--signal=KILL"], []):
                subprocess.run(["scancel", *options, "--user=root"], env=settings, capture_output=True)
            time.sleep(0.5)
        for process in reversed(running):
            process.terminate()
        for process in running:
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
