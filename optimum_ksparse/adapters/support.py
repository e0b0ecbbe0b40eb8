"""Tells PEFT of sparse modules, where PEFT is installed."""

from __future__ import annotations

import importlib.util

from transformers.utils import logging

from ..version import install_hint

logger = logging.get_logger(__name__)


def extend_peft() -> None:
    """Makes PEFT know sparse modules, once for the process: LoRA, rsLoRA, DoRA and HiRA wrap them in layers whose
    merging keeps every zero, other tuners are refused by name before they touch them, and parameters are counted as
    those of the dense model. It is called when the first sparse module is made. Where PEFT is not installed nothing
    happens; where it is too old, that is warned of."""
    if importlib.util.find_spec("peft") is None:
        return
    try:
        from .patches import apply

        apply()
    except (ImportError, AttributeError, KeyError) as error:  # a PEFT that is too old, or too new
        logger.warning_once(
            f"The PEFT that is installed cannot adapt sparse layers ({error}); {install_hint('finetune')}"
        )


def require_peft() -> None:
    """Raises ImportError, which names the extra to install, where PEFT is missing; extends it otherwise."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError(f"fine-tuning with adapters needs PEFT, which is not installed: {install_hint('finetune')}")
    extend_peft()
