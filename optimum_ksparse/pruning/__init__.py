"""Pruning a model: the block loop, one block, one layer or stack of experts."""

from .block import Replaced, collect_statistics, prune_one_block
from .layer import relative_output_error
from .layer_dropping import drop_layers
from .loop import check_replay, each_block, needs_original, prune_blocks
from .tokens import load_tokenizer

__all__ = [
    "Replaced",
    "check_replay",
    "collect_statistics",
    "drop_layers",
    "each_block",
    "load_tokenizer",
    "needs_original",
    "prune_blocks",
    "prune_one_block",
    "relative_output_error",
]
