"""Fine-tuning sparse models: PEFT on sparse modules, merging that keeps the mask, and the study's recipes. PEFT, and
the `Trainer` of transformers with what it needs, are imported by what is taken from here, not by the package."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .prepare import prepare_for_training
from .report import MergedLayer, MergeReport
from .settings import FinetuningSettings, adapter_config, linear_targets
from .support import extend_peft, require_peft

if TYPE_CHECKING:
    from .config import SparseLoraConfig
    from .koalpaca import KOALPACA, finetune_koalpaca, koalpaca_prompt
    from .merge import merge_adapter

# Names whose modules import PEFT, and those whose modules import `Trainer`.
_WITH_PEFT = {"SparseLoraConfig": "config", "merge_adapter": "merge"}
_WITH_TRAINER = {"KOALPACA": "koalpaca", "finetune_koalpaca": "koalpaca", "koalpaca_prompt": "koalpaca"}

__all__ = [
    "KOALPACA",
    "FinetuningSettings",
    "MergeReport",
    "MergedLayer",
    "SparseLoraConfig",
    "adapter_config",
    "extend_peft",
    "finetune_koalpaca",
    "koalpaca_prompt",
    "linear_targets",
    "merge_adapter",
    "prepare_for_training",
    "require_peft",
]


def __getattr__(name: str) -> Any:
    if name in _WITH_PEFT:
        require_peft()
    elif name not in _WITH_TRAINER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{(_WITH_PEFT | _WITH_TRAINER)[name]}", __name__), name)
