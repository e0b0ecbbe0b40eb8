"""A model as a row of decoder blocks: find them, capture their inputs, run tokens through one at a time."""

from .activations import Activations
from .experts import ExpertStack, eager_experts, use_eager_experts
from .find import DecoderBlocks, decoder_of, find_blocks
from .reading import find_read
from .replay import BlockReplay
from .routers import find_routers
from .running import evaluation_mode

__all__ = [
    "Activations",
    "BlockReplay",
    "DecoderBlocks",
    "ExpertStack",
    "decoder_of",
    "eager_experts",
    "evaluation_mode",
    "find_blocks",
    "find_read",
    "find_routers",
    "use_eager_experts",
]
