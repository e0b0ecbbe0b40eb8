"""The sparsity pattern as a value object: parsing, masks and verification.

Words: in ``n:m`` at most ``n`` of every ``m`` consecutive weights along the input dimension are NONZERO (the
hardware's convention). ``"50%"`` and ``"0.5"`` are a sparsity: the fraction of ZEROS.
"""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import torch

_ALLOWED = (
    'allowed: "n:m" with 0 < n < m (n nonzero weights in every m), such as "2:4" or "4:8"; '
    'or the fraction of zeros between 0 and 1, both excluded, such as "50%", "62.5%" or 0.5'
)

# Up to this group size, comparing every pair of positions is several times faster than sorting each group.
_PAIRWISE_LIMIT = 32


class Pattern:
    """Which weights may be nonzero.

    Args:
        pattern: `"n:m"` (`n` nonzero weights in every `m` consecutive ones of a row), or the fraction of zeros as a
            per cent (`"50%"`) or as a number between 0 and 1 (`"0.5"`, `0.5`, `"1/3"`). Another `Pattern` is copied.

    Attributes:
        n, m: the two numbers of `n:m`; None for an unstructured pattern.
        sparsity: the exact fraction of zeros, a `fractions.Fraction`.

    Raises:
        TypeError: `pattern` is neither a string, a number nor a `Pattern`.
        ValueError: `pattern` is not one of the forms above.
    """

    __slots__ = ("m", "n", "sparsity", "text")

    def __init__(self, pattern: str | float | Pattern) -> None:
        if isinstance(pattern, bool) or not isinstance(pattern, str | float | int | Fraction | Pattern):
            raise TypeError(f"pattern must be a string or a number, found {type(pattern).__name__}; {_ALLOWED}")
        self.text = str(pattern).strip()
        self.n: int | None = None
        self.m: int | None = None
        if ":" in self.text:
            match = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", self.text)
            if match is None or not 0 < int(match[1]) < int(match[2]):
                raise ValueError(f"pattern={self.text!r} is not a pattern; {_ALLOWED}")
            self.n, self.m = int(match[1]), int(match[2])
            self.sparsity = 1 - Fraction(self.n, self.m)
            return
        try:
            if not re.fullmatch(r"[0-9]{1,12}/[0-9]{1,12}|[0-9]{0,3}(\.[0-9]{1,20})?%?", self.text):
                raise ValueError
            # Through the text, so that 0.29 means 29/100 and not the nearest binary fraction, which lies below it.
            self.sparsity = Fraction(self.text[:-1]) / 100 if self.text.endswith("%") else Fraction(self.text)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"pattern={self.text!r} is not a pattern; {_ALLOWED}") from None
        if not 0 < self.sparsity < 1:
            raise ValueError(f"pattern={self.text!r} is out of range; {_ALLOWED}")

    @property
    def is_structured(self) -> bool:
        """True for `n:m`."""
        return self.m is not None

    @property
    def density(self) -> float:
        """Fraction of weights that may be nonzero."""
        return float(1 - self.sparsity)

    def with_sparsity(self, sparsity: Fraction) -> Pattern:
        """An unstructured pattern with another share of zeros, which is rounded to a ten-thousandth of a per cent, so
        that its text is exact."""
        parts = min(max(round(sparsity * 1_000_000), 1), 999_999)
        return Pattern(f"{parts / 10_000:.4f}".rstrip("0").rstrip(".") + "%")

    def num_zeros(self, count: int) -> int:
        """Exact number of zeros among `count` weights of an unstructured pattern or of whole groups:
        ⌊count·sparsity⌋."""
        return int(count * self.sparsity)

    def check_in_features(self, in_features: int, name: str = "weight") -> None:
        """Raises ValueError where the groups of `n:m` do not fill a row of `in_features` weights."""
        if self.m is not None and in_features % self.m:
            raise ValueError(
                f"{name} has {in_features} input features, which m={self.m} of pattern {self} does not divide"
            )

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """Keeps the highest scores: of each group for `n:m`, otherwise of each row (the last dimension).

        Counts are exact: ties are broken by position, the earlier weight goes first. To rank over a whole matrix, pass
        it as one row.

        Args:
            scores: [..., in], any real dtype.

        Returns:
            [..., in], bool: True where the weight is kept.

        Raises:
            ValueError: a score is NaN, or `m` does not divide the last dimension.
        """
        if scores.is_floating_point() and bool(scores.isnan().any()):
            raise ValueError("scores contain NaN, so they have no order; check the weights and the calibration inputs")
        if self.m is None or self.n is None:
            return ~lowest(scores, self.num_zeros(scores.shape[-1]))
        self.check_in_features(scores.shape[-1], "scores")
        groups = scores.unflatten(-1, (-1, self.m))
        if self.m <= _PAIRWISE_LIMIT:
            return (_ranks(groups) >= self.m - self.n).flatten(-2)
        return ~lowest(groups, self.m - self.n).flatten(-2)

    def verify(self, weight: torch.Tensor, name: str = "weight") -> None:
        """Checks that `weight` [out, in] has no more nonzero weights than the pattern allows.

        Raises:
            ValueError: names `name`, where the pattern is broken and by how much.
        """
        nonzero = weight != 0
        if self.m is None or self.n is None:
            # Row by row is the loosest exact count: ranking over wider scopes rounds down less often.
            allowed = weight.shape[0] * (weight.shape[1] - self.num_zeros(weight.shape[1]))
            found = int(nonzero.sum())
            if found > allowed:
                raise ValueError(f"{name} has {found} nonzero weights, pattern {self} allows {allowed}")
            return
        self.check_in_features(weight.shape[1], name)
        counts = nonzero.unflatten(-1, (-1, self.m)).sum(-1)
        if bool((counts > self.n).any()):
            row, group = (int(i) for i in (counts > self.n).nonzero()[0])
            raise ValueError(
                f"{name}: row {row}, columns {group * self.m} to {(group + 1) * self.m - 1} hold "
                f"{int(counts[row, group])} nonzero weights, pattern {self} allows {self.n}"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and (self.n, self.m, self.sparsity) == (other.n, other.m, other.sparsity)

    def __hash__(self) -> int:
        return hash((self.n, self.m, self.sparsity))

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Pattern({self.text!r})"


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Marks exactly `count` lowest scores of each row, the earlier one first among equals. Selecting the count-th
    value is linear; a stable sort of the same scores takes several times as long."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # float16 and bfloat16 have no selection kernel on every device, and float32 holds them exactly.
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    if scores.device.type == "cpu":  # NumPy selects two to four times as fast
        threshold = torch.from_numpy(np.partition(scores.detach().numpy(), count - 1)[..., count - 1 : count])
    else:
        threshold = scores.kthvalue(count, dim=-1, keepdim=True).values
    lowest = scores < threshold
    ties = scores == threshold
    missing = count - lowest.sum(-1, keepdim=True)
    return lowest | (ties & (ties.cumsum(-1, dtype=torch.int32) <= missing))


def _ranks(groups: torch.Tensor) -> torch.Tensor:
    """Ascending rank of each score in its group (the last dimension), the earlier one first among equals; uint8."""
    columns = groups.unbind(-1)
    ranks = []
    for i, column in enumerate(columns):
        rank = torch.zeros_like(column, dtype=torch.uint8)
        for j, other in enumerate(columns):
            if j != i:
                rank += (other <= column) if j < i else (other < column)
        ranks.append(rank)
    return torch.stack(ranks, dim=-1)
