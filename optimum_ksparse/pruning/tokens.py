"""Drawing the calibration samples of a model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..config import SparsityConfig, describe_source
from ..data import CalibrationTokens, calibration_tokens, read_tokenizer, tell_default_text
from ..dataset import is_token_ids, needs_tokenizer

logger = logging.get_logger(__name__)


def load_tokenizer(config: SparsityConfig, source: Any, **arguments: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer for the calibration text: `config.tokenizer`, or the one of `source`, loaded with `arguments` of
    `from_pretrained`. None where none is needed.

    Raises:
        ValueError: one is needed, and none can be loaded.
    """
    if not config.needs_data or is_token_ids(config.dataset):
        return None
    if isinstance(config.tokenizer, PreTrainedTokenizerBase):
        return config.tokenizer
    if config.tokenizer is not None:  # another repository than the weights': it has its own revisions and folders
        source = config.tokenizer
        arguments = {k: v for k, v in arguments.items() if k not in ("revision", "subfolder", "gguf_file")}
    try:
        return read_tokenizer(source, **arguments)
    except Exception as error:  # transformers and huggingface_hub raise many kinds here
        if not needs_tokenizer(config.dataset):
            return None
        raise ValueError(
            f"no tokenizer could be loaded from {describe_source(source)!r}: name one with "
            f"SparsityConfig(tokenizer=...), or pass token ids as the dataset; {error}"
        ) from error


def draw_tokens(
    model: PreTrainedModel, config: SparsityConfig, tokenizer: PreTrainedTokenizerBase | None
) -> CalibrationTokens:
    """The calibration samples, with the tokenizer that `load_tokenizer` gave."""
    if "dataset" not in config.given and tokenizer is not None:
        logger.warning(tell_default_text(config.dataset, tokenizer))
    return calibration_tokens(config, model, tokenizer)
