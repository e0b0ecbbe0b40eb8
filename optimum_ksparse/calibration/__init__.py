"""Calibration: text → token blocks; finding a model's decoder blocks; running tokens through one block at a time."""

from .activations import Activations
from .blocks import DecoderBlocks, decoder_of, find_blocks
from .experts import ExpertStack, eager_experts, use_eager_experts
from .language import tell_default_text
from .reaching import is_unreachable, reached_or_cached
from .reading import find_read
from .replay import BlockReplay, always_there
from .routers import find_routers
from .running import evaluation_mode
from .tokenizer import copy_processor, read_tokenizer, save_tokenizer
from .tokens import CalibrationTokens, calibration_tokens, prepends_bos, usual_context

__all__ = [
    "Activations",
    "BlockReplay",
    "CalibrationTokens",
    "DecoderBlocks",
    "ExpertStack",
    "always_there",
    "calibration_tokens",
    "copy_processor",
    "decoder_of",
    "eager_experts",
    "evaluation_mode",
    "find_blocks",
    "find_read",
    "find_routers",
    "is_unreachable",
    "prepends_bos",
    "reached_or_cached",
    "read_tokenizer",
    "save_tokenizer",
    "tell_default_text",
    "use_eager_experts",
    "usual_context",
]
