"""Pruning a model: the block loop, one block, one layer or stack of experts."""

from .expert_dropping import drop_experts
from .layer import relative_output_error
from .layer_dropping import drop_layers
from .loop import prune_blocks
from .progress import blocks_with_progress
