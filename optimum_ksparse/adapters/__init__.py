"""PEFT on sparse modules, and merging that keeps the mask. PEFT is imported by what is taken from here, not by the
package."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .prepare import prepare_for_training
from .report import MergedLayer, MergeReport
from .support import extend_peft, require_peft

if TYPE_CHECKING:
    from .config import SparseLoraConfig
    from .merge import merge_adapter

_WITH_PEFT = {"SparseLoraConfig": "config", "merge_adapter": "merge"}  # name → its module, which imports PEFT

__all__ = [
    "MergeReport",
    "MergedLayer",
    "SparseLoraConfig",
    "extend_peft",
    "merge_adapter",
    "prepare_for_training",
    "require_peft",
]


def __getattr__(name: str) -> Any:
    if name not in _WITH_PEFT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_peft()
    return getattr(importlib.import_module(f".{_WITH_PEFT[name]}", __name__), name)
