"""Calibration and evaluation text → token ids."""

from .calibration import CalibrationData, load_tokenizer
from .language import tell_default_text
from .reaching import reached_or_cached
from .tokenizer import copy_processor, read_tokenizer, save_tokenizer
from .tokens import CalibrationTokens, calibration_tokens, prepends_bos, usual_context
