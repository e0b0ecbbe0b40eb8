"""The study's fine-tuning tasks. `Trainer` of transformers, with what it needs, is imported by what is taken from
here, not by the package."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .settings import FinetuningSettings, adapter_config, linear_targets

if TYPE_CHECKING:
    from .koalpaca import KOALPACA, finetune_koalpaca, koalpaca_prompt

_WITH_TRAINER = ("KOALPACA", "finetune_koalpaca", "koalpaca_prompt")

__all__ = [
    "KOALPACA",
    "FinetuningSettings",
    "adapter_config",
    "finetune_koalpaca",
    "koalpaca_prompt",
    "linear_targets",
]


def __getattr__(name: str) -> Any:
    if name not in _WITH_TRAINER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".koalpaca", __name__), name)
