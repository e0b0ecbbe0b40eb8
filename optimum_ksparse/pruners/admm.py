"""ADMM with a moving mask: weights and mask found together. Boža 2024, arXiv 2401.02938, for any pattern."""

from __future__ import annotations

from fractions import Fraction

import torch

from ..pattern import Pattern
from ..statistics import GramMatrix
from .scaled import Scaled, cholesky_factor, restored, scale, to_rank

# Of all iterations, the share in which the mask may still move.
_MOVING = 0.75


def prune(
    weight: torch.Tensor,
    statistics: GramMatrix,
    pattern: Pattern,
    *,
    damping: float = 0.1,
    iterations: int = 20,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimises the layer's output error over weights and mask at once by the alternating direction method of
    multipliers, in units in which every input has the norm 1: Ŵ = W·D, D = √diag H, Ĥ = D⁻¹HD⁻¹ + damping·I.

    In the first three quarters of the iterations the mask is chosen anew from |Ŵ + U|, U being the running sum of what
    the mask has cut off: a weight that keeps being needed grows until it is kept. A mask without groups begins dense
    and closes by the cubic schedule s·(1 − (1 − t/T)³). The last quarter settles the weights on the final mask.

    Memory: two [in, in] and four [out, in] matrices in float32. Time: one inverse of [in, in], and a product
    [out, in] x [in, in] for each iteration.

    Args:
        weight: [out, in].
        statistics: Gram matrix of the inputs.
        pattern: what to keep; unstructured: of each output row; blocks: of the whole layer.
        damping: added to the unit diagonal of Ĥ: how closely weights are held to the dense ones.
        iterations: in all.

    Returns:
        The updated, pruned weight in the dtype of `weight`, and its mask, both [out, in].

    Raises:
        ValueError: `damping` or `iterations` is out of range, or weights become NaN or Inf.
        ArithmeticError: the damped Gram matrix has no Cholesky factor.
    """
    if damping < 0 or iterations < 1:
        raise ValueError(f"damping={damping} must be at least 0, and iterations={iterations} at least 1")
    problem = scale(weight, statistics, damping)
    moving = max(1, round(_MOVING * iterations))
    updated, mask = _iterate(problem, pattern, moving, iterations)
    return restored(updated * mask, problem, weight.dtype), mask


def _iterate(problem: Scaled, pattern: Pattern, moving: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ŵ + U and the mask, [out, in]. The penalty is 1, which suits a Gram matrix with a unit diagonal."""
    target = problem.weight @ problem.gram
    shifted = problem.gram.clone()
    shifted.diagonal().add_(1)
    inverse = torch.cholesky_inverse(cholesky_factor(shifted))
    total = problem.weight.clone()  # Ŵ + U
    mask = torch.ones_like(total, dtype=torch.bool)
    for step in range(1, iterations + 1):
        if step <= moving:
            mask = _closing(pattern, step / moving).mask(to_rank(total, pattern))
        kept = total * mask
        cut = total - kept  # U
        total = torch.addmm(cut, target.add(kept).sub_(cut), inverse)
    return total, mask


def _closing(pattern: Pattern, progress: float) -> Pattern:
    """The pattern at a share `progress` of the way to the final one."""
    if pattern.is_structured or progress >= 1:
        return pattern
    return pattern.with_sparsity(pattern.sparsity * Fraction(1 - (1 - progress) ** 3))
