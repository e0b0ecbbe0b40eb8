"""How a loaded sparse model computes: which kernels, which forms of the weights beside the packed ones, which products
together. Nothing here changes what the model is or what is saved."""

from .config import RuntimeConfig
from .running import autotune_kernels, configure, fuse_model, tell_cost_on_cpu
from .tuning import autotune

__all__ = [
    "RuntimeConfig",
    "autotune",
    "autotune_kernels",
    "configure",
    "fuse_model",
    "tell_cost_on_cpu",
]
