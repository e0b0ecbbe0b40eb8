"""A layer's least-squares problem in units in which every input has the norm 1, for the methods that iterate on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..pattern import Pattern
from .statistics import GramMatrix

# An input that is rarely there counts as having at least this share of the median norm: damping in units of its own
# hardly holds its weights, which would grow to fit the few tokens that have it, whatever they do on others. (ReLU
# features, 4096 tokens, 2:4: weights up to 50 times the dense ones, and on other tokens an error above SparseGPT's.)
_LEAST_NORM = 0.3


@dataclass
class Scaled:
    """Attributes:
    weight: Ŵ = W·D [out, in] float32.
    gram: Ĥ = D⁻¹HD⁻¹ + damping·I, [in, in] float32: its diagonal is 1 + damping, less for rare inputs.
    scale: D = √diag H, [in] float32, for rare inputs more; 1 for dead inputs, of which H has no entry.
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
    norms = diagonal.sqrt().masked_fill(dead, torch.nan)
    factor = norms.clamp(min=_LEAST_NORM * norms.nanmedian()).masked_fill(dead, 1)
    scaled = gram / factor / factor.unsqueeze(1)
    # What rounding made of a diagonal of 1 is near to that; of dead inputs it is 0, and 1 does as well.
    scaled.diagonal().copy_((norms / factor).square().masked_fill(dead, 1)).add_(damping)
    return Scaled((weight.float() * factor).masked_fill(dead, 0), scaled, factor, dead)


def restored(updated: torch.Tensor, problem: Scaled, dtype: torch.dtype) -> torch.Tensor:
    """Weights [out, in] in the units of the layer. Raises ValueError where they hold NaN or Inf, in `dtype` too."""
    return finite(updated / problem.scale, dtype)


def finite(updated: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Updated weights in another dtype. Raises ValueError where they hold NaN or Inf then."""
    weight = updated.to(dtype)
    if bool(weight.sum(dtype=torch.float32).isfinite()):
        return weight
    if bool(updated.sum().isfinite()):
        raise ValueError(f"the updated weights are too large for {dtype}: load the model in bfloat16 or float32")
    raise ValueError("the updated weights hold NaN or Inf; check the weights and the calibration inputs")


def to_rank(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Scores by which the nearest weight of the pattern is found: what is cut off is least in the sum of its squares,
    which |W| ranks one by one, but not summed over blocks."""
    return weight.abs() if pattern.tile is None else weight.square()


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
