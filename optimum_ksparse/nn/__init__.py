"""The sparse linear module, how it stores its weight, and the operators that it runs."""

from .linear import SparseLinear, dense_weight, densified, is_linear_map

__all__ = ["SparseLinear", "dense_weight", "densified", "is_linear_map"]
