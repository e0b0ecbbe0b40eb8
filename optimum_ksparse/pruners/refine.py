"""What may follow any method, on the same statistics: a better mask, or the best weights on it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..pattern import Pattern
from .scaled import finite
from .solve import solve_on_mask
from .statistics import GramMatrix
from .swaps import swap

_Pruned = tuple[torch.Tensor, torch.Tensor]
# Of conjugate gradient: what more of them would change is what the calibration hardly knows.
_STEPS = 30


def exact(
    weight: torch.Tensor, statistics: GramMatrix, pattern: Pattern, pruned: torch.Tensor, mask: torch.Tensor
) -> _Pruned:
    """The weights of least output error on the mask (see `solve`). Memory: six matrices [out, in]. Time: up to 30
    products [out, in] x [in, in]."""
    gram = statistics.gram.to(weight.device)
    solved = solve_on_mask(weight, gram, mask, start=pruned, max_steps=_STEPS)
    return finite(solved, pruned.dtype), mask


def swaps(
    weight: torch.Tensor, statistics: GramMatrix, pattern: Pattern, pruned: torch.Tensor, mask: torch.Tensor
) -> _Pruned:
    """A mask of lower output error, weight for weight (see `swaps`)."""
    return swap(weight, statistics.gram.to(weight.device), pruned, mask, pattern)


REFINEMENTS: dict[str, Callable[..., _Pruned]] = {"exact": exact, "swaps": swaps}
