"""Fine-tuning: distillation and KorQuAD by transformers' `Trainer`, KoAlpaca by TRL's `SFTTrainer`. `run.finetune`
does all, and imports what it needs of them."""

from .instructions import koalpaca_prompt
from .settings import (
    DistillSettings,
    FinetuningSettings,
    KoAlpacaSettings,
    KorQuADSettings,
    linear_targets,
    study_settings,
)
