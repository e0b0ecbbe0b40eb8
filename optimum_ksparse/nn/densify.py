"""Sparse modules that are dense in memory for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .experts import SparseExperts
from .linear import SparseLinear


@contextmanager
def densified(root: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Within it, sparse modules under `root` keep their weights dense instead of decompressing them in each forward
    pass; for many passes without gradients, under autocast to `dtype`, where one is given. Modules that accelerate has
    offloaded are left as they are."""
    kinds = (SparseLinear, SparseExperts)
    modules = [m for m in root.modules() if isinstance(m, kinds) and not m.weight.is_meta and m._dense_weight is None]
    try:
        for module in modules:
            module._dense_weight = module.to_dense_weight().to(dtype)
        yield
    finally:
        for module in modules:
            module._dense_weight = None
