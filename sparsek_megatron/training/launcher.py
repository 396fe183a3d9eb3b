# SPDX-License-Identifier: Apache-2.0
"""Start this machine's processes through torchrun's own agent, and hand their exit code on without its noise."""

import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from sparsek_megatron.errors import EXIT_UNREAD, EXIT_USAGE, RankError, UserError
from sparsek_megatron.stop_signals import release_signals

_START = "start through torchrun (launch/torchrun.sh) or with --nproc-per-node, which set it"


def order_launches(ranks_of_a_layer: int, *, in_pieces: bool = False) -> None:
    """Where several ranks share a layer, let the GPU start kernels in the order of their launch: a collective then
    begins before the matrix product that it overlaps, as Megatron expects of tensor and context parallelism.

    in_pieces: async tensor parallelism, whose two streams must not wait for each other; nothing is set.
    The driver reads this when CUDA starts: call it before anything asks for a device.
    """
    if ranks_of_a_layer > 1 and not in_pieces:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def is_launched() -> bool:
    """Whether torchrun (or another launcher) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size_of_environment() -> int:
    """Number of processes that the launcher started; 1 without a launcher.

    Raises:
        RankError: the environment says that there are several, but not which is this or where they meet.
    """
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}
    found = {name: os.environ.get(name, default) for name, default in names.items()}
    for name, value in found.items():
        if not value.isdecimal():
            raise RankError(f"{name}={value} in the environment: not a number; {_START}")
    rank, world_size = int(found["RANK"]), int(found["WORLD_SIZE"])
    if rank >= world_size:
        raise RankError(f"RANK={rank} in the environment: not below WORLD_SIZE={world_size}; {_START}")
    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size > 1 and absent:
        raise RankError(f"WORLD_SIZE={world_size} in the environment, but {absent[0]} is not set; {_START}")
    return world_size


def processes_to_start(processes: int | None) -> int:
    """`--nproc-per-node`, checked."""
    if processes is None or processes < 1:
        raise UserError(f"--nproc-per-node {processes}: must be at least 1")
    return processes


def _pass_on(*_: object) -> None:
    """Send SIGUSR1 on to the processes that this one has started and that catch it: one that is still starting would
    die of it. Again after a second, for those and for what has not been started yet.
    """
    for listed in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread or a process that has ended since
            for child in listed.read_text().split():
                if _catches(int(child), signal.SIGUSR1):
                    os.kill(int(child), signal.SIGUSR1)
    signal.alarm(1)


def _catches(process: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{process}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (number - 1) & 1)


@contextlib.contextmanager
def _passing_on() -> Iterator[None]:
    """A context in which SIGUSR1 to this process ends nothing here but is passed on; after it, it is ignored."""
    for number in (signal.SIGUSR1, signal.SIGALRM):
        signal.signal(number, _pass_on)
    release_signals()
    try:
        yield
    finally:
        for number in (signal.SIGUSR1, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)


def launch(program: str, argv: Sequence[str], processes: int) -> None:
    """Run `program` with `argv` in `processes` processes, as `torchrun --standalone --nproc-per-node` would.

    Each process gets its share of the cores in OMP_NUM_THREADS. SIGUSR1, which ends a run after a checkpoint, is passed
    on to them, until they have ended. Exits with the first failing process's code; a process that ended with a one-line
    report of a user's error, or because nobody reads its output, needs no more said about it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={uuid.uuid4()}"]
    arguments = parse_args([f"--nproc-per-node={processes}", *rendezvous, program, *argv])
    config, command, command_arguments = config_from_args(arguments)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        with _passing_on():
            elastic_launch(config=config, entrypoint=command)(*command_arguments)
    except SignalException as err:
        print(f"stopped by {err.sigval.name}; with --load, the same command resumes", file=sys.stderr)
        sys.exit(128 + err.sigval)
    except ChildFailedError as err:
        codes = {failure.exitcode for failure in err.failures.values()}
        for code in (EXIT_USAGE, EXIT_UNREAD):
            if code in codes:
                sys.exit(code)
        print(f"error: a training process failed (exit codes {sorted(codes)}); its output is above", file=sys.stderr)
        sys.exit(1)
