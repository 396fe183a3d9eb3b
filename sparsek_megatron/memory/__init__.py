# SPDX-License-Identifier: Apache-2.0
"""What lets long sequences fit: a loss without whole logits, checkpoints in CPU memory, an MLP in tiles.

Each is switched on for a built Megatron model and changes neither its parameters nor its results:

    use_chunked_loss(model)             the logits of a training forward exist one chunk of tokens at a time
    use_checkpoint_offload(model, ...)  layer inputs saved by full recompute wait in pinned CPU memory, or are not kept
    use_tiled_mlp(model, ...)           the MLP's inner activations exist one tile of tokens at a time
"""

from sparsek_megatron.memory.checkpoint_offload import use_checkpoint_offload
from sparsek_megatron.memory.chunked_loss import use_chunked_loss
from sparsek_megatron.memory.tiled_mlp import use_tiled_mlp

__all__ = ["use_checkpoint_offload", "use_chunked_loss", "use_tiled_mlp"]
