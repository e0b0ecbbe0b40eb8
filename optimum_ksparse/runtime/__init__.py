"""How a loaded sparse model computes: which kernels, and which form of the weights beside the packed one. Nothing here
changes what the model is or what is saved."""

from .config import RuntimeConfig, configure
from .tuning import autotune, autotune_kernels
