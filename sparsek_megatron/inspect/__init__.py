# SPDX-License-Identifier: Apache-2.0
"""What a trained model keeps: `python -m sparsek_megatron.inspect RUN --text FILE`."""
