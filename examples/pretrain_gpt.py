#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Pretrain a GPT with SparseK attention. `--help` lists the flags; `examples/configs/` has whole settings.

    python examples/pretrain_gpt.py --nproc-per-node 2 --config examples/configs/tiny_cpu.yaml \
        --tokenizer-model data/tokenizer.model --train-data-path data/py_train --valid-data-path data/py_valid \
        --save runs/tiny --load runs/tiny

or, with the processes started by torchrun itself: `torchrun --nproc-per-node 2 examples/pretrain_gpt.py ...`.
"""

import sys

from sparsek_megatron.quiet import quiet_dependencies
from sparsek_megatron.stop_signals import hold_signals

hold_signals()
quiet_dependencies()

from sparsek_megatron.errors import report_user_errors  # noqa: E402
from sparsek_megatron.training.pretrain import pretrain  # noqa: E402

if __name__ == "__main__":
    with report_user_errors():
        pretrain(sys.argv[1:], __file__)
