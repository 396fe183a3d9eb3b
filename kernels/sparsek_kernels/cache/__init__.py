# SPDX-License-Identifier: Apache-2.0
"""The generation cache: what SparseK attention keeps of a sequence, in memory that never grows."""

from .cache import SparseKCache

__all__ = ["SparseKCache"]
