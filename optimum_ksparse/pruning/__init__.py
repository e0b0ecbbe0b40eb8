"""Pruning a model: the block loop, one block, one layer or stack of experts."""

from .layer import relative_output_error
from .layer_dropping import drop_layers
from .loop import each_block, prune_blocks
from .tokens import load_tokenizer

__all__ = [
    "drop_layers",
    "each_block",
    "load_tokenizer",
    "prune_blocks",
    "relative_output_error",
]
