"""ALPS: ADMM with a growing penalty, then least squares on the mask that it found. Meng et al. 2024,
arXiv 2406.07831, algorithm 1 and section 3.3."""

from __future__ import annotations

from typing import Annotated

import torch

from ..pattern import Pattern
from .scaled import Scaled, restored, scale, to_rank
from .settings import DAMPING, ITERATIONS
from .solve import solve_on_mask
from .statistics import GramMatrix

CITATION = """@misc{meng2024alps,
  title  = {ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models},
  author = {Meng, Xiang and Behdin, Kayhan and Wang, Haoyue and Mazumder, Rahul},
  year   = {2024},
  eprint = {2406.07831},
  archivePrefix = {arXiv}
}"""

_FIRST_PENALTY = 0.1
_PERIOD = 3  # iterations between two looks at the support
# Share of the kept weights that changed since the last look → by how much the penalty grows.
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
_SOLVING_STEPS = 10


def prune(
    weight: torch.Tensor,
    statistics: GramMatrix,
    pattern: Pattern,
    *,
    damping: Annotated[float, DAMPING] = 0.01,
    iterations: Annotated[int, ITERATIONS] = 300,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimises the layer's output error over weights W and their sparse copy D, W = D, by the alternating direction
    method of multipliers with a penalty ρ that grows while the support of D moves, and stops when it does not. Ten
    steps of conjugate gradient on the mask follow.

    Works in units in which every input has the norm 1; one eigendecomposition in float64 serves every penalty. Memory:
    at most nine [in, in] and twenty [out, in] matrices in float32 (measured). Time: the decomposition, about 10·in³,
    and up to `iterations` times two products [out, in] x [in, in]: some ten times that of `admm`.

    Args:
        pattern: unstructured, and blocks: over the whole layer, as the paper has it.
        damping: added to the unit diagonal of the scaled Gram matrix.
        iterations: the most of them.

    Raises:
        ValueError: weights become NaN or Inf.
    """
    problem = scale(weight, statistics, damping)
    sparse, mask = _iterate(problem, pattern, iterations)
    solved = solve_on_mask(problem.weight, problem.gram, mask, start=sparse, max_steps=_SOLVING_STEPS)
    return restored(solved, problem, weight.dtype), mask


def _iterate(problem: Scaled, pattern: Pattern, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """D and its mask, [out, in]."""
    values, vectors = (t.float() for t in torch.linalg.eigh(problem.gram.double()))
    target = problem.weight @ problem.gram
    sparse, dual, penalty = problem.weight.clone(), torch.zeros_like(target), _FIRST_PENALTY
    looked_at = mask = _mask(pattern, sparse)
    for step in range(1, iterations + 1):
        dense = ((target - dual).add_(sparse, alpha=penalty) @ vectors).div_(values + penalty) @ vectors.T
        candidate = torch.add(dense, dual, alpha=1 / penalty)
        mask = _mask(pattern, candidate)
        sparse = candidate * mask
        dual.add_(dense - sparse, alpha=penalty)
        if step % _PERIOD == 0:
            moved = float((mask & ~looked_at).sum() / looked_at.sum())
            if moved == 0:
                break
            penalty *= next(factor for above, factor in _GROWTH if moved > above)
            looked_at = mask
    return sparse, mask


def _mask(pattern: Pattern, weight: torch.Tensor) -> torch.Tensor:
    return pattern.mask_of_layer(to_rank(weight, pattern))
