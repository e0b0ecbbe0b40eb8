"""A model as a row of decoder blocks: find them, capture their inputs, run tokens through one at a time."""

from .activations import Activations
from .experts import ExpertStack, eager_experts, use_eager_experts
from .find import DecoderBlocks, decoder_of, find_blocks
from .reading import find_read
from .replay import BlockReplay
from .routers import find_routers
from .running import evaluation_mode
