"""The sparse linear module, how it stores its weight, and the operators that it runs."""

from .densify import densified
from .experts import SparseExperts
from .linear import SparseLinear, dense_weight, is_linear_map
from .tuning import KernelReport, autotune

__all__ = [
    "KernelReport",
    "SparseExperts",
    "SparseLinear",
    "autotune",
    "dense_weight",
    "densified",
    "is_linear_map",
]
