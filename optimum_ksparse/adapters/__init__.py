"""PEFT on sparse modules, and merging that keeps the mask. PEFT is imported by what is taken from here, not by the
package."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from ..version import install_hint
from .prepare import prepare_for_training
from .report import MergedLayer, MergeReport

if TYPE_CHECKING:
    from .config import SparseLoraConfig
    from .merge import merge_adapter

_WITH_PEFT = {"SparseLoraConfig": "config", "merge_adapter": "merge"}  # name → its module, which imports PEFT


def require_peft() -> None:
    """Raises ImportError, which names the extra to install, where PEFT is missing."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError(f"fine-tuning with adapters needs PEFT, which is not installed: {install_hint('finetune')}")


def __getattr__(name: str) -> Any:
    if name not in _WITH_PEFT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_peft()
    return getattr(importlib.import_module(f".{_WITH_PEFT[name]}", __name__), name)
