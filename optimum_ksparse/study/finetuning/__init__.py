"""The study's fine-tuning tasks: KoAlpaca by TRL's `SFTTrainer`, KorQuAD by transformers' `Trainer`. `run.finetune`
does both, and imports what it needs of them."""

from .instructions import koalpaca_prompt
from .settings import FinetuningSettings, KoAlpacaSettings, KorQuADSettings, linear_targets, study_settings
