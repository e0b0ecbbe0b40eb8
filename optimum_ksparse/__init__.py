"""Sparse language models for Hugging Face: prune while loading, save, load, measure.

Importing this package registers it with transformers: `from_pretrained` takes a `sparsity_config`, and sparse
checkpoints load.
"""

from .api import prune_weight, sparsify
from .config import SparsityConfig
from .evaluation import evaluate_perplexity
from .integration import register
from .nn import SparseLinear
from .pattern import Pattern
from .report import SparsityReport
from .version import __version__

register()

__all__ = [
    "Pattern",
    "SparseLinear",
    "SparsityConfig",
    "SparsityReport",
    "__version__",
    "evaluate_perplexity",
    "prune_weight",
    "sparsify",
]
