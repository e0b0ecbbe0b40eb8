"""ADMM: weights and mask found together, while the mask moves. Boža 2024, arXiv 2401.02938, for any pattern."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated

import torch

from ..pattern import Pattern
from .scaled import Scaled, cholesky_factor, restored, scale, to_rank
from .settings import DAMPING, ITERATIONS
from .statistics import GramMatrix

CITATION = """@misc{boza2024admm,
  title  = {Fast and Effective Weight Update for Pruned Large Language Models},
  author = {Boža, Vladimír},
  year   = {2024},
  eprint = {2401.02938},
  archivePrefix = {arXiv}
}"""

# Of all iterations, the share in which the mask may still move.
_MOVING = 0.75
# From which share of the iterations on, which penalty. A small one at first lets the mask of n:m move further, as in
# ALPS: with 2:4 the perplexity of Gemma 3 270M went from 66.2 to 63.8 (three seeds), of SmolLM2-135M 26.2 to 24.7,
# in 1.1 times the time. A mask that closes step by step gains nothing by it.
_PENALTIES = ((0.0, 0.3), (0.25, 0.55), (0.5, 1.0))


def prune(
    weight: torch.Tensor,
    statistics: GramMatrix,
    pattern: Pattern,
    *,
    damping: Annotated[float, DAMPING] = 0.1,
    iterations: Annotated[int, ITERATIONS] = 20,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimises the layer's output error over weights and mask at once by the alternating direction method of
    multipliers, in units in which every input has the norm 1: Ŵ = W·D, D = √diag H, Ĥ = D⁻¹HD⁻¹ + damping·I.

    In the first three quarters of the iterations the mask is chosen anew from |Ŵ + U|, U being the running sum of what
    the mask has cut off: a weight that keeps being needed grows until it is kept. With n:m the penalty on what is cut
    off grows in three steps, 0.3, 0.55 and 1. Any other mask begins dense and closes by the cubic schedule
    s·(1 − (1 − t/T)³), the penalty being 1. The last quarter settles the weights on the final mask.

    Memory: at most four [in, in] and eleven [out, in] matrices in float32 (measured). Time: one inverse of [in, in],
    with n:m three, and a product [out, in] x [in, in] for each iteration.

    Args:
        pattern: unstructured: of each output row; blocks: of the whole layer.
        damping: added to the unit diagonal of Ĥ: how closely weights are held to the dense ones.
        iterations: in all.

    Raises:
        ValueError: weights become NaN or Inf.
        ArithmeticError: the damped Gram matrix has no Cholesky factor.
    """
    problem = scale(weight, statistics, damping)
    moving = max(1, round(_MOVING * iterations))
    updated, mask = _iterate(problem, pattern, moving, iterations)
    return restored(updated * mask, problem, weight.dtype), mask


def _iterate(problem: Scaled, pattern: Pattern, moving: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ŵ + U and the mask, [out, in]."""
    target = problem.weight @ problem.gram
    total = problem.weight.clone()  # Ŵ + U
    mask = torch.ones_like(total, dtype=torch.bool)
    penalty = _penalty(pattern, 0)
    inverse = _inverse(problem.gram, penalty)
    for step in range(1, iterations + 1):
        if step <= moving:
            mask = _closing(pattern, step / moving).mask(to_rank(total, pattern))
        kept = total * mask
        cut = total.sub_(kept)  # U
        grown = _penalty(pattern, (step - 1) / iterations)
        if grown != penalty:
            cut.mul_(penalty / grown)  # U is in units of 1 / penalty
            del inverse  # before there is another one
            penalty, inverse = grown, _inverse(problem.gram, grown)
        torch.add(target, kept, alpha=penalty, out=kept).sub_(cut, alpha=penalty)
        total = torch.addmm(cut, kept, inverse)
        del kept, cut
    return total, mask


def _inverse(gram: torch.Tensor, penalty: float) -> torch.Tensor:
    """(Ĥ + penalty·I)⁻¹."""
    shifted = gram.clone()
    shifted.diagonal().add_(penalty)
    lower = cholesky_factor(shifted)
    del shifted
    return torch.cholesky_inverse(lower)


def _penalty(pattern: Pattern, progress: float) -> float:
    """At a share `progress` of the iterations. 1 suits a Gram matrix with a unit diagonal."""
    if not pattern.is_semi_structured:
        return 1.0
    return next(penalty for start, penalty in reversed(_PENALTIES) if progress >= start)


def _closing(pattern: Pattern, progress: float) -> Pattern:
    """The pattern at a share `progress` of the way to the final one."""
    if pattern.is_semi_structured or progress >= 1:
        return pattern
    return pattern.with_sparsity(pattern.sparsity * Fraction(1 - (1 - progress) ** 3))
