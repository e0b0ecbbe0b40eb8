"""Sparse language models for Hugging Face: prune while loading, save, load, measure, publish.

Importing this package registers it with transformers: `from_pretrained` takes a `sparsity_config`, and sparse
checkpoints load, `push_to_hub` publishes them with a card.
"""

from typing import TYPE_CHECKING, Any

from . import adapters
from .api import prune_checkpoint, prune_weight, sparsify
from .config import SparsityConfig
from .evaluation import (
    EvaluationProtocol,
    EvaluationResults,
    evaluate_kobest,
    evaluate_model,
    evaluate_perplexity,
)
from .hub import write_card
from .integration import register
from .nn import SparseLinear
from .pattern import Pattern
from .pruning import drop_experts, drop_layers
from .report import SparsityReport
from .runtime import RuntimeConfig, configure
from .version import __version__

if TYPE_CHECKING:
    from .adapters import merge_adapter

register()

__all__ = [
    "EvaluationProtocol",
    "EvaluationResults",
    "Pattern",
    "RuntimeConfig",
    "SparseLinear",
    "SparsityConfig",
    "SparsityReport",
    "__version__",
    "configure",
    "drop_experts",
    "drop_layers",
    "evaluate_kobest",
    "evaluate_model",
    "evaluate_perplexity",
    "merge_adapter",
    "prune_checkpoint",
    "prune_weight",
    "sparsify",
    "write_card",
]


def __getattr__(name: str) -> Any:
    if name != "merge_adapter":  # needs PEFT, which is imported when it is taken from here
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(adapters, name)
