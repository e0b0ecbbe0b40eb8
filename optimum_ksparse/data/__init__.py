"""Calibration and evaluation text → token ids."""

from .calibration import CalibrationData, load_tokenizer
from .reaching import find_file, hub_arguments, reached_or_cached
from .tokenizer import copy_processor, read_tokenizer, save_tokenizer, tell_default_text
from .tokens import CalibrationTokens, calibration_tokens, prepends_bos, usual_context
