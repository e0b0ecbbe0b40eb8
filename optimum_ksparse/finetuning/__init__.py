"""Fine-tuning sparse models: PEFT on sparse modules, merging that keeps the mask, and the study's recipes. PEFT is
imported by what is taken from here, not by the package."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .prepare import prepare_for_training
from .settings import FinetuningSettings, adapter_config, linear_targets
from .support import extend_peft, require_peft
from .training import finish, train

if TYPE_CHECKING:
    from .config import SparseLoraConfig

# Names whose modules import PEFT.
_WITH_PEFT = {"SparseLoraConfig": "config"}

__all__ = [
    "FinetuningSettings",
    "SparseLoraConfig",
    "adapter_config",
    "extend_peft",
    "finish",
    "linear_targets",
    "prepare_for_training",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _WITH_PEFT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_peft()
    return getattr(importlib.import_module(f".{_WITH_PEFT[name]}", __name__), name)
