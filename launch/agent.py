# SPDX-License-Identifier: Apache-2.0
"""torchrun for `torchrun.sh`: takes torchrun's arguments, and does not start again what would only fail again.

torchrun's agent answers every failure with a restart. A process that ends with exit code 2 has told the user in one
line what to fix (a flag, a full disk, a loss that is no number), and a restart would tell it again: here it ends the
launch on every node, with exit code 2 and nothing further said. Other failures are restarted, each with a line that
names the rank.
"""

import contextlib
import logging
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError
from torch.distributed.launcher import api as launcher

from sparsek_megatron.errors import EXIT_UNREAD, EXIT_USAGE

FINAL = (EXIT_USAGE, EXIT_UNREAD)
_CODE, _LEAVING = "final_exit_code", "agents_leaving"
_LISTEN_SECONDS = 1.0  # between two looks at whether another node's agent has ended the launch
_HEAR_SECONDS = 3.0  # a failure here may be the echo of another node's, whose agent is about to say so
_LEAVE_SECONDS = 60.0  # the agent that hosts the store stays until the others have read it, ended their
_CLOSE_SECONDS = 2.0  # processes, and closed their end


class Agent(LocalElasticAgent):
    """torchrun's agent of one node. The agents of a launch tell each other a final exit code in the rendezvous' store,
    which lasts for one round: between two restarts."""

    hosts_store = False
    _listened = 0.0

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        codes = {failure.exitcode for failure in result.failures.values()}
        final = next((code for code in FINAL if code in codes), None)
        if (worker_group.group_world_size or 1) > 1:
            final = self._agree(final, worker_group, failed=result.is_failed())
        if final is not None:
            raise SystemExit(final)
        if result.is_failed() and self._remaining_restarts:
            restarts = worker_group.spec.max_restarts
            number = restarts - self._remaining_restarts + 1
            _say(f"{describe(result.failures)}; all processes start again (restart {number} of {restarts})")
        return result

    def _agree(self, final: int | None, worker_group: WorkerGroup, *, failed: bool) -> int | None:
        """The exit code that ends the launch on every node, this one's or another's; None to go on."""
        store: Any = self._store
        now = time.monotonic()
        if final is None and not failed and now < self._listened + _LISTEN_SECONDS:
            return None
        self._listened = now
        with contextlib.suppress(RuntimeError):  # the store's host is gone: the next rendezvous will say so
            if final is None and not _wait(lambda: store.check([_CODE]), _HEAR_SECONDS if failed else 0.0):
                return None
            final = int(store.get(_CODE)) if final is None else final
            store.set(_CODE, str(final))
            self._stop_workers(worker_group)
            store.add(_LEAVING, 1)
            if self.hosts_store:
                _wait(lambda: store.add(_LEAVING, 0) >= worker_group.group_world_size, _LEAVE_SECONDS)
                time.sleep(_CLOSE_SECONDS)
        return final


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition holds within that time."""
    deadline = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return holds


def describe(failures: Mapping[int, Any]) -> str:
    """How the first rank of this node that failed has ended; those after it may have been ended by the agent."""
    rank = min(failures, key=lambda each: failures[each].timestamp)
    code = failures[rank].exitcode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"rank {rank} {how}"


def _say(line: str) -> None:
    print(f"launch/torchrun.sh: {line}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
    """Run torchrun with `argv`.

    Exits with 2 (or 141, output that nobody reads) after such an end of a process, 128 + the number of a signal that
    ended the launcher, and 1 when the restarts are used up or the nodes do not find each other.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    arguments = torchrun.parse_args(argv)
    launcher.LocalElasticAgent = Agent  # where torchrun makes its agent; it offers no other way in
    Agent.hosts_store = "is_host=1" in arguments.rdzv_conf.split(",")
    where = f"the rendezvous at {arguments.rdzv_endpoint}"
    try:
        torchrun.run(arguments)
    except ChildFailedError as err:
        restarts = f"no restart is left (MAX_RESTARTS={arguments.max_restarts})"
        _end(1, f"error: {describe(err.failures)}; its output is above, and {restarts}")
    except SignalException as err:
        _end(128 + err.sigval, f"stopped by {err.sigval.name}; with --load, the same command resumes")
    except RendezvousClosedError:
        _end(1, f"error: {where} was closed: another node has ended for good, and its output says why")
    except RendezvousError as err:
        reason = " ".join(str(err.__cause__ or err).split()).rstrip(".")
        advice = "see that every node is started with the same NNODES, MASTER_ADDR, MASTER_PORT and RDZV_ID"
        _end(1, f"error: {where}: {reason or type(err).__name__}; {advice}")


def _end(code: int, line: str) -> NoReturn:
    _say(line)
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
