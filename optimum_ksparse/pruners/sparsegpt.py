"""SparseGPT: column by column, each error made good by the columns still to come. Frantar and Alistarh 2023,
arXiv 2301.00774, algorithm 1."""

from __future__ import annotations

import itertools
import weakref
from typing import Annotated

import torch

from ..pattern import Pattern, lowest, lowest_tiles
from .notes import note
from .scaled import finite
from .settings import DAMPING, whole
from .statistics import GramMatrix
from .sweep import one_thread, sweep

CITATION = """@misc{frantar2023sparsegpt,
  title  = {SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot},
  author = {Frantar, Elias and Alistarh, Dan},
  year   = {2023},
  eprint = {2301.00774},
  archivePrefix = {arXiv}
}"""
_BLOCK_SIZE = whole("columns that sparsegpt sweeps before it updates the rest; a group or tile must divide it")


def prune(
    weight: torch.Tensor,
    statistics: GramMatrix,
    pattern: Pattern,
    *,
    block_size: Annotated[int, _BLOCK_SIZE] = 128,
    damping: Annotated[float, DAMPING] = 0.01,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeroes weights by W²/U_jj² and updates the kept ones to the right of them, with U the upper Cholesky factor of
    the inverse of H + damping·mean(diag H)·I.

    Unstructured, and blocks: ranked over each block of `block_size` columns and all rows. `n:m`: each group is ranked
    when the sweep reaches it, by weights already updated.

    Args:
        block_size: columns swept before the rest of the matrix is updated; `m` and `c` must divide it.
        damping: share of the mean of the diagonal of H that is added to it.

    Raises:
        ValueError: `m` or `c` does not divide `block_size`, or weights become NaN or Inf.
        ArithmeticError: H stays singular with a damping of 1.
    """
    if block_size % pattern.width:
        raise ValueError(f"block_size={block_size} is not a multiple of {pattern.width}, as pattern {pattern} needs")
    columns = weight.shape[1]
    factor, scale = (tensor.to(weight.device) for tensor in inverse_factor(statistics, damping))
    dead = (statistics.squared_norms == 0).to(weight.device).unsqueeze(1)
    # Transposed, so that each column of the sweep is contiguous in memory; in units of U_jj until the end.
    updated = weight.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    updated.div_(scale.masked_fill(dead, torch.inf))
    mask = torch.empty_like(updated, dtype=torch.bool)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block = updated[start:stop]
        with one_thread(weight.device):
            if not pattern.is_semi_structured:
                mask[start:stop] = _mask_of_columns(block, pattern, start)
            errors = sweep(block, factor[start:stop, start:stop], pattern, mask[start:stop])
        updated[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    # As products: a fill at scattered places takes five times as long on a CPU. 0 added to −0 is 0.
    updated.mul_(scale).mul_(mask).add_(0)
    return finite(updated, weight.dtype).T.contiguous(), mask.T.contiguous()


def _mask_of_columns(values: torch.Tensor, pattern: Pattern, start: int) -> torch.Tensor:
    """The mask of `values` [columns, out], which begin at column `start` of the layer and are in units of U_jj."""
    rows, stop = values.shape[1], start + len(values)
    high, wide = pattern.tile or (1, 1)
    # The difference of two running counts, so that the whole layer has the exact number of zeros.
    before, behind = (pattern.num_zeros(rows // high * (column // wide)) for column in (start, stop))
    if pattern.tile is None:
        return ~lowest(values.abs().view(1, -1), behind - before).view_as(values)
    return ~lowest_tiles(values.square(), behind - before, (wide, high))


_Factor = tuple[torch.Tensor, torch.Tensor]
# A factor lives as long as its statistics: layers fed by the same tensor share both.
_FACTORS: weakref.WeakKeyDictionary[GramMatrix, tuple[tuple[int, float], _Factor, float]] = weakref.WeakKeyDictionary()


def inverse_factor(statistics: GramMatrix, damping: float) -> _Factor:
    """Upper Cholesky factor U of (H + damping·mean(diag H)·I)⁻¹, as `sweep` takes it: U_jk/U_kk for k > j,
    otherwise 0, [in, in] float32, and U_jj, [in, 1]. Where H is singular in float32 and in float64 the damping is
    raised by ten times up to 1, with a warning."""
    key = (statistics.num_tokens, damping)
    if statistics not in _FACTORS or _FACTORS[statistics][0] != key:
        _FACTORS[statistics] = (key, *_factorise(statistics.gram, damping))
    _, factor, used = _FACTORS[statistics]
    if used != damping:
        note(f"singular Gram matrix: damping raised from {damping:g} to {used:g}")
    return factor


def _factorise(gram: torch.Tensor, damping: float) -> tuple[_Factor, float]:
    """The factor and the damping with which it exists.

    With the order of the columns reversed, H = L·Lᵀ of a lower L turns into H = R·Rᵀ of an upper R, so that U = R⁻¹:
    half of the work of inverting H and factorising the inverse, and more exact.
    """
    diagonal = gram.diagonal()
    dead = diagonal == 0
    # Dead inputs count as zeros here, whatever the scale of H: their 1 below only makes H invertible.
    mean = diagonal.mean()
    tries = [damping]
    while tries[-1] < 1:
        tries.append(min(10 * tries[-1] or 0.01, 1.0))
    for damping, dtype in itertools.product(tries, (torch.float32, torch.float64)):
        damped = gram.to(dtype).flip(0, 1)
        damped.diagonal().add_((dead.to(dtype) + damping * mean).flip(0))
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed:
            _invert(lower)
            upper = lower.flip(0, 1)
            scale = upper.diagonal().clone()
            factor = upper.div_(scale).triu_(1).float()
            if bool(factor.isfinite().all()) and bool(scale.isfinite().all()):
                return (factor, scale.float().unsqueeze(1)), damping
    raise ArithmeticError(
        f"the Gram matrix [{len(gram)}, {len(gram)}] stays singular with a damping of {damping:g}: "
        "use more calibration samples, or look for overflow in the layer's inputs"
    )


def _invert(lower: torch.Tensor) -> None:
    """Inverts a lower triangular matrix in place, by halves: [[A, 0], [B, C]] → [[A⁻¹, 0], [−C⁻¹·B·A⁻¹, C⁻¹]].
    Solving for the identity takes twice as long, as it does not know that half of the result is zero."""
    half = len(lower) // 2
    if half < 128:
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    first, corner, second = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert(first)
    _invert(second)
    torch.mm(second @ corner, first, out=corner).neg_()
