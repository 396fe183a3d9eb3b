#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Continue prompts with a checkpoint of pretrain_gpt.py, in constant memory. `--help` lists the flags.

python examples/generate.py --load runs/quickstart --prompt 'def main(' --temperature 0.7 --top-p 0.9
python examples/generate.py --load runs/quickstart --prompt 'import ' --prompt 'class ' --prompt-file long.txt
cat long.txt | python examples/generate.py --load runs/quickstart
"""

import sys

from sparsek_megatron.quiet import quiet_dependencies

quiet_dependencies()

from sparsek_megatron.errors import report_user_errors  # noqa: E402
from sparsek_megatron.training.generate import generate_program  # noqa: E402

if __name__ == "__main__":
    with report_user_errors():
        generate_program(sys.argv[1:], __file__)
