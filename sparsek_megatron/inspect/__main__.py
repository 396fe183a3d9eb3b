# SPDX-License-Identifier: Apache-2.0
"""`python -m sparsek_megatron.inspect`."""

import sys

from sparsek_megatron.quiet import quiet_dependencies

quiet_dependencies()

from sparsek_megatron.errors import report_user_errors  # noqa: E402
from sparsek_megatron.inspect.program import inspect_program  # noqa: E402

if __name__ == "__main__":
    with report_user_errors():
        inspect_program(sys.argv[1:], __file__)
