"""How a loaded sparse model computes."""

from .tuning import autotune

__all__ = [
    "autotune",
]
