#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Continue a prompt with a checkpoint of pretrain_gpt.py. `--help` lists the flags.

    python examples/generate_text.py --load runs/quickstart --prompt 'def main(' --temperature 0.7
"""

import sys

from sparsek_megatron.quiet import quiet_dependencies

quiet_dependencies()

from sparsek_megatron.errors import report_user_errors  # noqa: E402
from sparsek_megatron.training.generate import generate_program  # noqa: E402

if __name__ == "__main__":
    with report_user_errors():
        generate_program(sys.argv[1:], __file__)
