"""The sparse linear module, how it stores its weight, and the operators that it runs."""

from .dense import compute_by_torch, compute_natively
from .experts import SparseExperts
from .linear import SparseLinear, dense_weight, is_linear_map
from .masked import masked_linear, row_norms
from .packed import check_trainable, densified
from .placement import local, onloaded
