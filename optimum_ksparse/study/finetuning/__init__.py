"""The study's fine-tuning tasks: KoAlpaca by TRL's `SFTTrainer`, KorQuAD by transformers' `Trainer`. `koalpaca` and
`korquad.run` import them, not the package."""

from .instructions import koalpaca_prompt
from .settings import (
    FinetuningSettings,
    KoAlpacaSettings,
    KorQuADSettings,
    adapter_config,
    linear_targets,
    study_settings,
)

__all__ = [
    "FinetuningSettings",
    "KoAlpacaSettings",
    "KorQuADSettings",
    "adapter_config",
    "koalpaca_prompt",
    "linear_targets",
    "study_settings",
]
