"""A layer's least-squares problem in units in which every input has the norm 1, for the methods that iterate on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..pattern import Pattern
from ..statistics import GramMatrix


@dataclass
class Scaled:
    """Attributes:
    weight: Ŵ = W·D [out, in] float32.
    gram: Ĥ = D⁻¹HD⁻¹ + damping·I, [in, in] float32: its diagonal is 1 + damping.
    scale: D = √diag H, [in] float32; 1 for dead inputs, of which H has no entry.
    dead: [in] bool, inputs that are always zero: their weights are zero in `weight`, so that they go first.
    """

    weight: torch.Tensor
    gram: torch.Tensor
    scale: torch.Tensor
    dead: torch.Tensor


def scale(weight: torch.Tensor, statistics: GramMatrix, damping: float) -> Scaled:
    """The problem of `weight` [out, in] in any floating dtype, on its device."""
    gram = statistics.gram.to(weight.device)
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    factor = diagonal.masked_fill(dead, 1).sqrt()
    scaled = gram / factor / factor.unsqueeze(1)
    scaled.diagonal().fill_(1 + damping)  # what rounding made of it is near to that
    return Scaled((weight.float() * factor).masked_fill(dead, 0), scaled, factor, dead)


def restored(updated: torch.Tensor, problem: Scaled, dtype: torch.dtype) -> torch.Tensor:
    """Weights [out, in] in the units of the layer. Raises ValueError where they hold NaN or Inf."""
    if not bool(updated.sum().isfinite()):
        raise ValueError("the updated weights hold NaN or Inf; check the weights and the calibration inputs")
    return (updated / problem.scale).to(dtype)


def to_rank(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Scores by which the nearest weight of the pattern is found: what is cut off is least in the sum of its squares,
    which |W| ranks one by one, but not summed over blocks."""
    return weight.abs() if pattern.block is None else weight.square()


def cholesky_factor(matrix: torch.Tensor) -> torch.Tensor:
    """The lower Cholesky factor of a positive definite `matrix` [n, n] float32, made in float64 where float32 fails.

    Raises:
        ArithmeticError: there is none.
    """
    for dtype in (torch.float32, torch.float64):
        lower, failed = torch.linalg.cholesky_ex(matrix.to(dtype))
        if not failed:
            return lower.float()
    raise ArithmeticError(
        f"the Gram matrix [{len(matrix)}, {len(matrix)}] is not positive definite: use more calibration samples, or "
        "look for overflow in the layer's inputs"
    )
