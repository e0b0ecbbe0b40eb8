"""What the tasks share: the model that trains, and saving and finding what came of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from ..staging import staged
from .prepare import prepare_for_training
from .settings import FinetuningSettings, adapter_config, linear_targets
from .support import require_peft
from .training import RECORDS

logger = logging.get_logger(__name__)


def add_adapter(model: PreTrainedModel, settings: FinetuningSettings, **more: Any) -> Any:
    """The PEFT model that `settings` ask for, drawn with their seed; with `method="full"` the model itself, all of
    whose weights train.

    Args:
        more: arguments of `adapter_config`.
    """
    set_seed(settings.seed)
    if settings.method == "full":
        if model.dtype.itemsize < 4:
            logger.warning(
                f"The weights train in {model.dtype}, in which small updates are lost: load them in float32."
            )
        model.config.use_cache = False
        return model.requires_grad_(True).train()
    require_peft()
    from peft import get_peft_model

    config = adapter_config(settings, linear_targets(model), **more)
    prepare_for_training(model, gradient_checkpointing=settings.gradient_checkpointing)
    return get_peft_model(model, config).train()


def is_main() -> bool:
    """Whether this is the process that writes: the only one, or the first."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_rank())


def save_run(model: Any, tokenizer: PreTrainedTokenizerBase, output: str | os.PathLike[str]) -> bool:
    """Saves an adapter or a model, and the tokenizer; whole or not at all. Gives False in all processes but the first
    one, which alone writes."""
    if not is_main():
        return False
    with staged(output, gone=RECORDS) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        # PEFT's empty form of a card; the card of this model is written from what is known of it.
        (staging / "README.md").unlink(missing_ok=True)
    return True


def finished_model(model: PreTrainedModel, settings: FinetuningSettings, output: str | os.PathLike[str]) -> Any:
    """The model that an earlier run saved in `output`."""
    if settings.method == "full":
        return type(model).from_pretrained(os.fspath(Path(output)), dtype=model.dtype)
    require_peft()
    from peft import PeftModel

    return PeftModel.from_pretrained(model, os.fspath(output)).eval()
