# SPDX-License-Identifier: Apache-2.0
"""The pretraining program with a fault put into it: `program.py FAULT[@RANK:STEP] flags...`.

FAULT is none, nan (that rank's loss is NaN at that step), or hang (that rank sleeps there instead of training).
"""

import math
import sys
import time

from sparsek_megatron.quiet import quiet_dependencies

quiet_dependencies()

from sparsek_megatron.errors import report_user_errors  # noqa: E402
from sparsek_megatron.training.launcher import is_launched  # noqa: E402
from sparsek_megatron.training.pretrain import pretrain  # noqa: E402


def put_in(fault: str, rank: int, steps: range) -> None:
    """Make `rank` misbehave in optimizer steps `steps`, counted from 1."""
    from sparsek_megatron.training.loop import Trainer

    one_step, loss = Trainer._one_step, Trainer._loss
    taken = {"step": 0}

    def faulty_step(self, data, **options):
        taken["step"] = int(self.engine.global_steps) + 1
        if fault == "hang" and self.machine.rank == rank and taken["step"] in steps:
            time.sleep(3600)
        return one_step(self, data, **options)

    def faulty_loss(self, batch):
        value = loss(self, batch)
        bad = fault == "nan" and self.machine.rank == rank and taken["step"] in steps and self.engine.training
        return value * math.nan if bad else value

    Trainer._one_step, Trainer._loss = faulty_step, faulty_loss


if __name__ == "__main__":
    name, _, where = sys.argv[1].partition("@")
    if name != "none" and is_launched():
        who, first, last = (int(part) for part in where.split(":"))
        put_in(name, who, range(first, last + 1))
    with report_user_errors():
        # The launcher starts this file again, with the fault as its first argument.
        from sparsek_megatron.training import pretrain as module

        launch = module.launch
        module.launch = lambda program, argv, processes: launch(program, [sys.argv[1], *argv], processes)
        pretrain(sys.argv[2:], __file__)
