"""SparseGPT: prune column by column, each error made good by the columns still to come. Frantar and Alistarh 2023,
arXiv 2301.00774, algorithm 1."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from ..pattern import Pattern, lowest
from ..statistics import GramMatrix


def prune(
    weight: torch.Tensor, statistics: GramMatrix, pattern: Pattern, *, block_size: int = 128, damping: float = 0.01
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeroes weights by W²/U_jj² and updates the kept ones to the right of them, with U the upper Cholesky factor of
    the inverse of H + damping·mean(diag H)·I.

    Unstructured: ranked over each block of `block_size` columns and all rows. `n:m`: each group is ranked when the
    sweep reaches it, by weights already updated.

    Args:
        weight: [out, in].
        statistics: Gram matrix of the inputs.
        pattern: what to keep.
        block_size: columns swept before the rest of the matrix is updated; `m` must divide it.
        damping: share of the mean of the diagonal of H that is added to it.

    Returns:
        The updated, pruned weight in the dtype of `weight`, and its mask, both [out, in].

    Raises:
        ValueError: `m` does not divide `block_size`, or `damping` is out of range.
        ArithmeticError: H stays singular with a damping of 1.
    """
    if not 0 <= damping <= 1:
        raise ValueError(f"damping={damping} is out of range, it must be from 0 to 1")
    if pattern.m is not None and block_size % pattern.m:
        raise ValueError(f"block_size={block_size} is not a multiple of m={pattern.m} of pattern {pattern}")
    rows, columns = weight.shape
    factor = _inverse_factor(statistics, damping).to(weight.device)
    # Transposed, so that each column of the sweep is contiguous in memory.
    updated = weight.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    updated[(statistics.squared_norms == 0).to(weight.device)] = 0
    mask = torch.empty_like(updated, dtype=torch.bool)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block, block_factor = updated[start:stop], factor[start:stop, start:stop]
        if not pattern.is_structured:
            scores = block.square() / block_factor.diagonal().square().unsqueeze(1)
            # The difference of two running counts, so that the whole layer has the exact number of zeros.
            zeros = pattern.num_zeros(rows * stop) - pattern.num_zeros(rows * start)
            mask[start:stop] = ~lowest(scores.reshape(1, -1), zeros).view_as(scores)
        with _one_thread() if weight.device.type == "cpu" else nullcontext():
            errors = _sweep(block, block_factor, pattern, mask[start:stop])
        updated[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    updated.masked_fill_(~mask, 0)
    return updated.T.to(weight.dtype).contiguous(), mask.T.contiguous()


@contextmanager
def _one_thread() -> Iterator[None]:
    """The sweep's operations are too small to share over threads: waking them costs more than they save, and on a
    machine that is busy with something else ten times as much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _sweep(block: torch.Tensor, factor: torch.Tensor, pattern: Pattern, mask: torch.Tensor) -> torch.Tensor:
    """Sweeps one block of columns, in place.

    Args:
        block: [columns, out] float32, the transposed weights, updated in place.
        factor: [columns, columns], this block's corner of U.
        pattern: `n:m` chooses `mask` group by group; otherwise `mask` is taken as it is.
        mask: [columns, out] bool.

    Returns:
        [columns, out], the errors (w − q)/U_jj.
    """
    errors = torch.empty_like(block)
    diagonal = factor.diagonal()
    for j in range(len(block)):
        if pattern.m is not None and j % pattern.m == 0:
            group = slice(j, j + pattern.m)
            scores = block[group].square() / diagonal[group].square().unsqueeze(1)
            mask[group] = pattern.mask(scores.T).T
        torch.div(block[j].masked_fill(mask[j], 0), diagonal[j], out=errors[j])
        block[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return errors


# A factor lives as long as its statistics: layers fed by the same tensor share both.
_FACTORS: weakref.WeakKeyDictionary[GramMatrix, tuple[tuple[int, float], torch.Tensor, float]] = (
    weakref.WeakKeyDictionary()
)


def _inverse_factor(statistics: GramMatrix, damping: float) -> torch.Tensor:
    """Upper Cholesky factor U of (H + damping·mean(diag H)·I)⁻¹, [in, in] float32. Where H is singular in float32
    and in float64 the damping is raised by ten times up to 1, with a warning."""
    key = (statistics.num_tokens, damping)
    if statistics not in _FACTORS or _FACTORS[statistics][0] != key:
        _FACTORS[statistics] = (key, *_factorise(statistics.gram, damping))
    _, factor, used = _FACTORS[statistics]
    if used != damping:
        warnings.warn(f"singular Gram matrix: damping raised from {damping:g} to {used:g}", stacklevel=2)
    return factor


def _factorise(gram: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """The factor and the damping with which it exists."""
    diagonal = gram.diagonal()
    dead = diagonal == 0
    # Dead inputs count as zeros here, whatever the scale of H: their 1 below only makes H invertible.
    mean = diagonal.mean()
    tries = [damping]
    while tries[-1] < 1:
        tries.append(min(10 * tries[-1] or 0.01, 1.0))
    for damping, dtype in itertools.product(tries, (torch.float32, torch.float64)):
        damped = gram.to(dtype, copy=True)
        damped.diagonal().add_(dead.to(dtype) + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and bool(factor.isfinite().all()):
            return factor.float(), damping
    raise ArithmeticError(
        f"the Gram matrix [{len(gram)}, {len(gram)}] stays singular with a damping of {damping:g}: "
        "use more calibration samples, or look for overflow in the layer's inputs"
    )
