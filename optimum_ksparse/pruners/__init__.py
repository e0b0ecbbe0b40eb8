"""One file a method, pure tensor maths: `(weight, statistics, pattern, **settings) -> (weight, mask)`.

`weight` is [out, in] in any floating dtype and is not changed; the returned weight has its dtype and is zero where the
returned mask ([out, in], bool, True = kept) is False. A method warns (`warnings.warn`) of what the user should know,
such as a raised damping; the block loop writes it into the report. To add a method: its file, its line in `METHODS`, a
test, a recipe. `sweep` and `sweep_kernel` are the inner loop of SparseGPT, in torch and for a GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..statistics import ColumnNorms, GramMatrix
from . import magnitude, sparsegpt, wanda


@dataclass(frozen=True)
class Method:
    """A pruning method: its function, the statistics it reads, and over what it ranks an unstructured pattern."""

    prune: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    statistics: type[ColumnNorms] | None
    scope: str

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the keyword settings that the method takes; `SparsityConfig` has a field of the same name for
        each."""
        parameters = inspect.signature(self.prune).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


METHODS = {
    "magnitude": Method(magnitude.prune, None, "whole layer"),
    "wanda": Method(wanda.prune, ColumnNorms, "output row"),
    "sparsegpt": Method(sparsegpt.prune, GramMatrix, "block of columns over all rows"),
}

__all__ = ["METHODS", "Method"]
