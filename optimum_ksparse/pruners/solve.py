"""The exact weights on a fixed mask: least squares of a layer's outputs, all rows at once, by conjugate gradient."""

from __future__ import annotations

import torch

from ..pattern import Pattern
from .scaled import finite
from .statistics import GramMatrix

# Finished rows are dropped from the products as soon as they are this share of all.
_DROP = 0.25
# Of a refinement: what more of them would change is what the calibration hardly knows.
_STEPS = 30


def exact(
    weight: torch.Tensor, statistics: GramMatrix, pattern: Pattern, pruned: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The refinement "exact": the weights of least output error on the mask. Memory: six matrices [out, in]. Time: up
    to 30 products [out, in] x [in, in]."""
    gram = statistics.gram.to(weight.device)
    return finite(solve_on_mask(weight, gram, mask, start=pruned, max_steps=_STEPS), pruned.dtype), mask


def solve_on_mask(
    weight: torch.Tensor,
    gram: torch.Tensor,
    mask: torch.Tensor,
    *,
    start: torch.Tensor | None = None,
    cross: torch.Tensor | None = None,
    damping: float = 0.0,
    max_steps: int = 100,
    tolerance: float = 1e-3,
) -> torch.Tensor:
    """The weights Ŵ, zero where `mask` is False, that minimise ‖XŴᵀ − Y‖² / tokens, by conjugate gradient on the kept
    entries of each row, preconditioned by the diagonal of H (Hestenes and Stiefel 1952; Saad 2003, algorithm 9.1).

    With Y = XWᵀ the best output error that this mask allows is reached. Where Y comes from elsewhere, such as a layer
    whose own inputs are others than X, `cross` says what is to be met.

    Args:
        weight: W [out, in] in any floating dtype: the target.
        gram: H = XᵀX / tokens, [in, in] float32 or float64; the products are made in its dtype.
        mask: [out, in] bool, True where a weight is kept.
        start: [out, in], where to start; what is outside the mask is left out. None starts from W itself.
        cross: YᵀX / tokens, [out, in]; None stands for WH.
        damping: adds damping · mean(diag H) · ‖Ŵ − start‖², which holds weights near the start where the inputs say
            little.
        max_steps: at most so many products with H.
        tolerance: a row is finished when its residual, in the norm of the preconditioner, is this share of the first.

    Returns:
        Ŵ [out, in] in the dtype of `gram`. The objective of no row is above that of the start. Weights of inputs that
        are always zero (H_jj = 0) keep their start.
    """
    diagonal = gram.diagonal()
    kept = mask.to(gram.dtype)
    first = (weight if start is None else start).to(gram) * kept
    # What Y − XŴᵀ says of each weight: half of the negative gradient.
    residual = (weight.to(gram) - first) @ gram if cross is None else cross.to(gram) - first @ gram
    ridge = damping * diagonal.mean()
    inverse = torch.where(diagonal > 0, 1 / (diagonal + ridge), 0)
    change = _conjugate_gradient(residual * kept, gram, kept, ridge, inverse, max_steps, tolerance)
    # In exact arithmetic it never grows; rounding may let it, where there was nothing to gain.
    growth = ((change @ gram - 2 * residual) * change).sum(1, dtype=torch.float64)
    return first + change * ((growth < 0) & growth.isfinite()).to(gram.dtype).unsqueeze(1)


def _conjugate_gradient(
    residual: torch.Tensor,
    gram: torch.Tensor,
    kept: torch.Tensor,
    ridge: torch.Tensor,
    inverse: torch.Tensor,
    max_steps: int,
    tolerance: float,
) -> torch.Tensor:
    """The change of the weights [out, in] that makes `residual` [out, in] vanish on the kept entries; `inverse` [in]
    is the preconditioner, zero for inputs that are to be left alone."""
    change = torch.zeros_like(residual)
    rows = torch.arange(len(residual), device=residual.device)
    solution = torch.zeros_like(residual)  # of the rows at work
    kept = kept * (inverse > 0)
    residual = residual * kept
    direction = residual * inverse
    size = _dot(residual, direction)
    goal = tolerance**2 * size
    for _ in range(max_steps):
        at_work = size > goal
        if not bool(at_work.any()):
            break
        if at_work.sum() <= (1 - _DROP) * len(rows):
            change[rows] = solution
            rows, size, goal = rows[at_work], size[at_work], goal[at_work]
            solution, kept = solution[at_work], kept[at_work]
            residual, direction = residual[at_work], direction[at_work]
        product = torch.addmm(direction, direction, gram, beta=float(ridge)).mul_(kept)
        step = _ratio(size, _dot(direction, product)).to(gram.dtype).unsqueeze(1)
        solution.addcmul_(direction, step)
        residual.addcmul_(product, step, value=-1)
        scaled = residual * inverse
        previous, size = size, _dot(residual, scaled)
        direction = scaled.addcmul_(direction, _ratio(size, previous).to(gram.dtype).unsqueeze(1))
    change[rows] = solution
    return change


def _dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Scalar products of the rows, [out] float64."""
    return (left * right).sum(1, dtype=torch.float64)


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """0 where nothing is left to divide by: such a row has reached what its precision allows."""
    return torch.where(denominator > 0, numerator / denominator, 0)
