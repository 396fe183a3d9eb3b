#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Text files, folders or .jsonl -> tokenizer and Megatron IndexedDataset files. `--help` lists the flags.

    python examples/prepare_data.py --input my_texts/ --include '*.md' --validation-fraction 0.05 \
        --train-tokenizer --vocab-size 8192 --tokenizer-model data/tokenizer.model --output-prefix data/mine
"""

from sparsek_megatron.quiet import quiet_dependencies

quiet_dependencies()

from sparsek_megatron.data.prepare import prepare  # noqa: E402
from sparsek_megatron.errors import report_user_errors  # noqa: E402

if __name__ == "__main__":
    with report_user_errors():
        prepare()
