# SPDX-License-Identifier: Apache-2.0
"""Linear-time selection: `select`, what it returns, and its score gradient."""

from .api import pool_indices, select
from .gradient import score_gradient
from .types import Selection, SelectionState, list_tile

__all__ = ["Selection", "SelectionState", "list_tile", "pool_indices", "score_gradient", "select"]
