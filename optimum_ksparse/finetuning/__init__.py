"""Fine-tuning sparse models: PEFT on sparse modules, merging that keeps the mask, and the study's recipes. PEFT is
imported by what is taken from here, not by the package."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .koalpaca import KOALPACA, finetune_koalpaca, koalpaca_prompt
from .korquad import evaluate_korquad, finetune_korquad, load_korquad_model
from .prepare import prepare_for_training
from .report import MergedLayer, MergeReport
from .settings import FinetuningSettings, adapter_config, linear_targets
from .support import extend_peft, require_peft
from .training import finish, train

if TYPE_CHECKING:
    from .config import SparseLoraConfig
    from .merge import merge_adapter

# Names whose modules import PEFT.
_WITH_PEFT = {"SparseLoraConfig": "config", "merge_adapter": "merge"}

__all__ = [
    "KOALPACA",
    "FinetuningSettings",
    "MergeReport",
    "MergedLayer",
    "SparseLoraConfig",
    "adapter_config",
    "evaluate_korquad",
    "extend_peft",
    "finetune_koalpaca",
    "finetune_korquad",
    "finish",
    "koalpaca_prompt",
    "linear_targets",
    "load_korquad_model",
    "merge_adapter",
    "prepare_for_training",
    "require_peft",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _WITH_PEFT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_peft()
    return getattr(importlib.import_module(f".{_WITH_PEFT[name]}", __name__), name)
