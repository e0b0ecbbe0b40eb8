"""Which pattern each layer gets: pure functions of what a pass over the dense model has measured (`sensitivity`).

Unstructured patterns: OWL (Yin et al. 2023, arXiv 2310.05175, section 3). Of each decoder block the share of outliers
is measured, entries of |W_ij|·‖X_j‖₂ above `OUTLIER_MULTIPLE` times their mean over the block. Scaled to
[0, 2·`SPREAD`] over all blocks, that share is what a block keeps above others, around the same mean.

n:m: of each layer the relative loss under each pattern of the asked density is predicted. A layer counts as much as it
has weights, and so many stay dense as the budget allows: those with the largest relative loss. (On Gemma 3 270M, Wanda
2:4 with target_density 0.6, 12 x 256 tokens, perplexity was 75.9 so, 81.7 where each layer counts once, 85.2 with
absolute losses, and 113.7 with 4:8 everywhere.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from ..kernels import GROUPS
from ..pattern import Pattern

ALLOCATIONS = ("uniform", "owl")
LEFT_DENSE = "left dense by target_density"
# M and λ of OWL; the paper takes M = 5 or 7 and λ = 0.08 for most models.
OUTLIER_MULTIPLE = 5.0
SPREAD = Fraction(8, 100)
# However far apart the blocks are, each keeps a tenth of the asked density, and loses a tenth of the asked sparsity.
_LEAST_SHARE = Fraction(1, 10)


@dataclass
class LayerMeasure:
    """What was measured of the layer at `name` in the decoder: the share of outliers in its whole block, or the
    relative loss that is predicted under each pattern."""

    name: str
    block: int
    num_weights: int
    outliers: float | None = None
    losses: dict[str, float] = field(default_factory=dict)


@dataclass
class Allocation:
    """What each layer gets.

    Attributes:
        patterns: path of the layer in the decoder → its pattern; None where it stays dense.
        sensitivities: path → what decided it: the share of outliers in its block, or its predicted loss under the
            pattern that was asked for.
    """

    patterns: dict[str, str | None]
    sensitivities: dict[str, float]


def check_allocation(allocation: str, pattern: Pattern, target_density: float | None, reads_data: bool) -> None:
    """Raises ValueError for settings that no allocation can meet; says what is possible."""
    if allocation == "uniform":
        return
    if not reads_data:
        raise ValueError(
            'allocation="owl" compares layers by their inputs, and this method reads no data: use "wanda" or another '
            'that reads data, or allocation="uniform"'
        )
    if not pattern.is_semi_structured:
        if target_density is not None and abs(target_density - pattern.density) > 1e-9:
            zeros = float(100 * (1 - Fraction(str(target_density))))
            raise ValueError(
                f"target_density={target_density} is not the density {pattern.density:g} of pattern {pattern}, which "
                f'says it alone: leave target_density out, or use pattern="{zeros:g}%"'
            )
    elif target_density is None:
        raise ValueError(
            f'allocation="owl" with pattern {pattern} needs target_density, the mean share of weights to store, from '
            f"{pattern.density:g} to 1: what it is above {pattern.density:g} goes to layers that stay dense"
        )
    elif target_density < pattern.density:
        raise ValueError(
            f"target_density={target_density} cannot be met with pattern {pattern}: the least is {pattern.density:g}"
        )


def allocate(measures: Sequence[LayerMeasure], pattern: Pattern, target_density: float | None) -> Allocation:
    """What each layer gets, for the pattern that was asked for."""
    if pattern.is_semi_structured:
        assert target_density is not None
        patterns = _least_loss(measures, pattern, target_density)
        return Allocation(patterns, {measure.name: measure.losses[str(pattern)] for measure in measures})
    outliers = {measure.block: measure.outliers or 0.0 for measure in measures}
    num_weights = dict.fromkeys(outliers, 0)
    for measure in measures:
        num_weights[measure.block] += measure.num_weights
    shares = block_sparsities(list(outliers.values()), list(num_weights.values()), pattern.sparsity)
    of_block = {block: str(pattern.with_sparsity(share)) for block, share in zip(outliers, shares, strict=True)}
    return Allocation(
        {measure.name: of_block[measure.block] for measure in measures},
        {measure.name: outliers[measure.block] for measure in measures},
    )


def _least_loss(measures: Sequence[LayerMeasure], pattern: Pattern, target_density: float) -> dict[str, str | None]:
    """Each layer's pattern of least loss; and dense, from the one that loses most for each weight on, those that still
    fit. Where all layers have one size that is the least sum of losses there is; otherwise it is above it by less than
    the largest loss."""
    patterns: dict[str, str | None] = {}
    zeros = {measure.name: pattern.num_zeros(measure.num_weights) for measure in measures}
    saved = {}
    for measure in measures:
        patterns[measure.name] = best = min(measure.losses, key=measure.losses.__getitem__)
        saved[measure.name] = measure.losses[best] * measure.num_weights / zeros[measure.name]
    # Through the text, so that 0.6 is not the binary fraction below it.
    density = max(Fraction(str(target_density)), 1 - pattern.sparsity)
    budget = (density - (1 - pattern.sparsity)) * sum(measure.num_weights for measure in measures)
    for name in sorted(patterns, key=saved.__getitem__, reverse=True):
        if saved[name] > 0 and zeros[name] <= budget:
            patterns[name] = None
            budget -= zeros[name]
    return patterns


def block_sparsities(outliers: Sequence[float], weights: Sequence[int], sparsity: Fraction) -> list[Fraction]:
    """The sparsity of each block, by OWL.

    Args:
        outliers: share of outliers in each block.
        weights: how many weights each has to prune.
        sparsity: of all of them together.

    Returns:
        Exact fractions between 0 and 1 whose mean, weighted by `weights`, is `sparsity`: less where there are more
        outliers. Where it would leave that range the spread is made smaller.
    """
    shares = [Fraction(share) for share in outliers]
    low, high = min(shares), max(shares)
    if low == high:
        return [sparsity] * len(shares)
    kept = [2 * SPREAD * (share - low) / (high - low) for share in shares]
    mean = sum((weight * share for weight, share in zip(weights, kept, strict=True)), Fraction(0)) / sum(weights)
    moves = [mean - share for share in kept]
    room_below, room_above = (1 - _LEAST_SHARE) * sparsity, (1 - _LEAST_SHARE) * (1 - sparsity)
    factor = min(Fraction(1), room_below / -min(moves), room_above / max(moves))
    return [sparsity + factor * move for move in moves]


def same_density(pattern: Pattern, in_features: int, block_size: int | None = None) -> list[Pattern]:
    """The n:m patterns to choose from at one density: the pattern itself, and 2n:2m, which has as many bytes and a
    wider choice of weights. Not where `in_features` or `block_size` are no multiple of 2m, and not where there are
    kernels for n:m alone."""
    assert pattern.n is not None and pattern.m is not None
    wider = Pattern(f"{2 * pattern.n}:{2 * pattern.m}")
    divides = in_features % (2 * pattern.m) == 0 and (block_size or 0) % (2 * pattern.m) == 0
    as_fast = str(pattern) not in GROUPS or str(wider) in GROUPS
    return [pattern, wider] if divides and as_fast else [pattern]
