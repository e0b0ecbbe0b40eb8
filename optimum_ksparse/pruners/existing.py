"""Existing: the zeros that a weight has are kept and everything else stays as it is, for models that were pruned
elsewhere; no data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from fractions import Fraction

import torch

from ..pattern import Pattern

# A layer with a smaller share of zeros is dense: at an eighth the mask, one bit for each weight, costs half of what
# the zeros save in 16 bit; fewer come about by rounding, or where a few outputs have died.
LEAST_ZEROS = Fraction(1, 8)
NOT_SPARSE = "not sparse: its weight has fewer zeros than one in eight"
_GROUP_SIZES = (4, 8, 16, 32)
# Of the values that n:m stores so many are nonzero: in a small layer unstructured zeros may keep to 7:8 by chance.
_LEAST_FILLED = Fraction(9, 10)


def prune(weight: torch.Tensor, statistics: None, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask of the nonzero weights; groups of `n:m` are filled up to n, and the number of tiles to the pattern's.

    Args:
        weight: [out, in].
        statistics: not read.
        pattern: that the weight has.

    Returns:
        The weight and its mask, both [out, in].

    Raises:
        ValueError: the weight does not have the pattern.
    """
    pattern.verify(weight)
    mask = pattern.mask(weight.abs()) if pattern.is_semi_structured or pattern.tile else weight != 0
    return weight.masked_fill(~mask, 0), mask


def recognise(weight: torch.Tensor) -> Pattern | None:
    """The pattern that the zeros of a weight [out, in], or of a stack of them, have: of all `n:m` that hold and are
    filled the sparsest, of the smallest m; otherwise the share of zeros. None where it is dense, and for a stack whose
    zeros keep to no `n:m`."""
    nonzero = weight != 0
    count, total = int(nonzero.sum()), nonzero.numel()
    if total - count < LEAST_ZEROS * total:
        return None
    patterns = []
    for m in _GROUP_SIZES:
        if weight.shape[-1] % m == 0:
            n = max(1, int(nonzero.unflatten(-1, (-1, m)).sum(-1).max()))
            if n < m and (not count or count >= _LEAST_FILLED * total * n / m):
                patterns.append(Pattern(f"{n}:{m}"))
    if patterns:
        return min(patterns, key=lambda pattern: pattern.density)
    return None if weight.dim() > 2 else share_of_zeros(count, total)


def exact_groups(mask: torch.Tensor) -> Pattern | None:
    """The `n:m` of the smallest m that a mask [out, in] keeps to exactly; None where there is none."""
    for m in _GROUP_SIZES:
        if mask.shape[-1] % m == 0:
            counts = mask.unflatten(-1, (-1, m)).sum(-1)
            n = int(counts[0, 0])
            if 0 < n < m and bool((counts == n).all()):
                return Pattern(f"{n}:{m}")
    return None


def commonest(patterns: Iterable[str]) -> str:
    """The pattern that stands for those of all layers: the commonest `n:m`, or the middle one of the shares of zeros
    where most layers have such."""
    texts = list(patterns)
    shares = sorted(
        (text for text in texts if not Pattern(text).is_semi_structured), key=lambda t: Pattern(t).sparsity
    )
    counts = Counter(shares[len(shares) // 2] if text in shares else text for text in texts)
    return counts.most_common(1)[0][0]


def share_of_zeros(count: int, total: int) -> Pattern:
    """The unstructured pattern of a weight that keeps `count` of `total`: not one zero more than there are."""
    return Pattern("50%").with_sparsity(Fraction((total - count) * 1_000_000 // total, 1_000_000))
