"""How a loaded sparse model computes: which kernels, and which form of the weights beside the packed one. Nothing here
changes what the model is or what is saved."""

from .config import RuntimeConfig
from .running import autotune_kernels, configure
from .tuning import autotune

__all__ = ["RuntimeConfig", "autotune", "autotune_kernels", "configure"]
