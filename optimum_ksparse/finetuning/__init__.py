"""Fine-tuning sparse models: PEFT on sparse modules, merging that keeps the mask, and the study's recipes. PEFT is
imported by the functions that use it."""

from .settings import FinetuningSettings, adapter_config, linear_targets
from .training import finish, train

__all__ = ["FinetuningSettings", "adapter_config", "finish", "linear_targets", "train"]
