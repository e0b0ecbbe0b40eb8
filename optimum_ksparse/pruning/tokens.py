"""Drawing the calibration samples of a model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .. import data
from ..config import SparsityConfig

logger = logging.get_logger(__name__)


def load_tokenizer(config: SparsityConfig, source: Any, **arguments: Any) -> PreTrainedTokenizerBase | None:
    """As `data.load_tokenizer`; None where pruning reads no data."""
    return data.load_tokenizer(config.calibration, source, **arguments) if config.needs_data else None


def draw_tokens(
    model: PreTrainedModel, config: SparsityConfig, tokenizer: PreTrainedTokenizerBase | None
) -> data.CalibrationTokens:
    """The calibration samples, with the tokenizer that `load_tokenizer` gave.

    Raises:
        ValueError: they cannot be drawn, or some samples alone would lose their first position.
    """
    if "dataset" not in config.given and tokenizer is not None:
        logger.warning(data.tell_default_text(config.dataset, tokenizer))
    tokens = data.calibration_tokens(config.calibration, model, tokenizer)
    counts = config.method_setting("bos_in_statistics")
    if counts is False and len({part["begins_with_bos"] for part in tokens.description.get("parts", ())}) > 1:
        raise ValueError(
            "bos_in_statistics=False leaves out the first position of every sample, and in this mix the samples of "
            "'self' alone begin with the beginning token: pass prepend_bos=True, or bos_in_statistics=True"
        )
    tokens.description["bos_in_statistics"] = counts is not False
    return tokens
