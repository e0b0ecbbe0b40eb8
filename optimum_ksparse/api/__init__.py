"""The functions that every path ends in: prune a model in place, a checkpoint from disk to disk, or one layer."""

from .checkpoint import prune_checkpoint
from .layer import prune_weight
from .model import dequantize_values, sparsify
