"""The sparsity pattern as a value object: parsing, masks and verification.

Words: in ``n:m`` at most ``n`` of every ``m`` consecutive weights along the input dimension are NONZERO (the
hardware's convention). ``"50%"`` and ``"0.5"`` are a sparsity: the fraction of ZEROS. ``"50%/32x32"`` is that fraction
of whole blocks of 32 outputs x 32 inputs.
"""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import torch

_ALLOWED = (
    'allowed: "n:m" with 0 < n < m (n nonzero weights in every m), such as "2:4" or "4:8"; '
    'or the fraction of zeros between 0 and 1, both excluded, such as "50%", "62.5%" or 0.5; '
    'or that fraction of whole blocks of r outputs x c inputs, "50%/rxc" such as "50%/32x32"'
)

# Up to this group size, comparing every pair of positions is several times faster than sorting each group.
_PAIRWISE_LIMIT = 32


class Pattern:
    """Which weights may be nonzero.

    Args:
        pattern: `"n:m"` (`n` nonzero weights in every `m` consecutive ones of a row), or the fraction of zeros as a
            per cent (`"50%"`) or as a number between 0 and 1 (`"0.5"`, `0.5`, `"1/3"`), with `"/rxc"` behind it where
            blocks of r outputs x c inputs are kept or zeroed whole (`"50%/32x32"`). Another `Pattern` is copied.

    Attributes:
        n, m: the two numbers of `n:m`; None for other patterns.
        block: (r, c) of a block pattern; None for other patterns.
        sparsity: the exact fraction of zeros, a `fractions.Fraction`.

    Raises:
        TypeError: `pattern` is neither a string, a number nor a `Pattern`.
        ValueError: `pattern` is not one of the forms above.
    """

    __slots__ = ("block", "m", "n", "sparsity", "text")

    def __init__(self, pattern: str | float | Pattern) -> None:
        if isinstance(pattern, bool) or not isinstance(pattern, str | float | int | Fraction | Pattern):
            raise TypeError(f"pattern must be a string or a number, found {type(pattern).__name__}; {_ALLOWED}")
        self.text = str(pattern).strip()
        self.n: int | None = None
        self.m: int | None = None
        self.block: tuple[int, int] | None = None
        if ":" in self.text:
            match = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", self.text)
            if match is None or not 0 < int(match[1]) < int(match[2]):
                raise ValueError(f"pattern={self.text!r} is not a pattern; {_ALLOWED}")
            self.n, self.m = int(match[1]), int(match[2])
            self.sparsity = 1 - Fraction(self.n, self.m)
            return
        share, size = self.text, re.fullmatch(r"(.+)/([0-9]{1,6})x([0-9]{1,6})", self.text)
        if size is not None:
            share, self.block = size[1], (int(size[2]), int(size[3]))
        try:
            if not re.fullmatch(r"[0-9]{1,12}/[0-9]{1,12}|[0-9]{0,3}(\.[0-9]{1,20})?%?", share):
                raise ValueError
            if self.block is not None and not all(self.block):
                raise ValueError
            # Through the text, so that 0.29 means 29/100 and not the nearest binary fraction, which lies below it.
            self.sparsity = Fraction(share[:-1]) / 100 if share.endswith("%") else Fraction(share)
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

    @property
    def width(self) -> int:
        """Neighbouring input columns that are decided together: m, or c of a block, otherwise 1."""
        return self.m or (self.block or (1, 1))[1]

    def with_sparsity(self, sparsity: Fraction) -> Pattern:
        """A pattern with another share of zeros, unstructured or of the same blocks; it is rounded to a ten-thousandth
        of a per cent, so that its text is exact."""
        parts = min(max(round(sparsity * 1_000_000), 1), 999_999)
        blocks = "" if self.block is None else f"/{self.block[0]}x{self.block[1]}"
        return Pattern(f"{parts / 10_000:.4f}".rstrip("0").rstrip(".") + "%" + blocks)

    def num_zeros(self, count: int) -> int:
        """Exact number of zeros among `count` weights of an unstructured pattern or of whole groups, or among `count`
        blocks: ⌊count·sparsity⌋."""
        return int(count * self.sparsity)

    def misfit(self, out_features: int, in_features: int) -> str | None:
        """Why a weight of this shape cannot have the pattern; None where it can."""
        if self.m is not None and in_features % self.m:
            return f"has {in_features} input features, which m={self.m} of pattern {self} does not divide"
        if self.block is not None and (out_features % self.block[0] or in_features % self.block[1]):
            sizes = f"{self.block[0]} must divide the outputs, {self.block[1]} the inputs"
            return f"is {out_features} x {in_features}, which the blocks of pattern {self} do not fill ({sizes})"
        return None

    def check_shape(self, out_features: int, in_features: int, name: str = "weight") -> None:
        """Raises ValueError where the groups of `n:m` do not fill a row, or the blocks do not fill the weight."""
        reason = self.misfit(out_features, in_features)
        if reason is not None:
            raise ValueError(f"{name} {reason}")

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """Keeps the highest scores: of each group for `n:m`, of each row (the last dimension) where unstructured; of
        blocks those with the highest sums, over the whole matrix.

        Counts are exact: ties are broken by position, the earlier weight goes first.

        Args:
            scores: [..., out, in], any real dtype; but for blocks [..., in] will do.

        Returns:
            bool, of the same shape: True where the weight is kept.

        Raises:
            ValueError: a score is NaN, or groups or blocks do not fill the matrix.
        """
        if scores.is_floating_point() and bool(scores.isnan().any()):
            raise ValueError("scores contain NaN, so they have no order; check the weights and the calibration inputs")
        if self.block is not None:
            self.check_shape(scores.shape[-2], scores.shape[-1], "scores")
            number = scores.shape[-2] // self.block[0] * (scores.shape[-1] // self.block[1])
            return ~lowest_blocks(scores, self.num_zeros(number), self.block)
        if self.m is None or self.n is None:
            return ~lowest(scores, self.num_zeros(scores.shape[-1]))
        self.check_shape(1, scores.shape[-1], "scores")
        groups = scores.unflatten(-1, (-1, self.m))
        if self.m <= _PAIRWISE_LIMIT:
            return (_ranks(groups) >= self.m - self.n).flatten(-2)
        return ~lowest(groups, self.m - self.n).flatten(-2)

    def mask_of_layer(self, scores: torch.Tensor) -> torch.Tensor:
        """As `mask`, of scores [out, in], but an unstructured pattern is ranked over the whole matrix."""
        if self.is_structured or self.block is not None:
            return self.mask(scores)
        return self.mask(scores.reshape(1, -1)).view_as(scores)

    def verify(self, weight: torch.Tensor, name: str = "weight") -> None:
        """Checks that `weight` [out, in] has no more nonzero weights than the pattern allows.

        Raises:
            ValueError: names `name`, where the pattern is broken and by how much.
        """
        nonzero = weight != 0
        if self.block is not None:
            self.check_shape(weight.shape[0], weight.shape[1], name)
            blocks = in_blocks(nonzero, self.block).any(-1)
            allowed = blocks.numel() - self.num_zeros(blocks.numel())
            if int(blocks.sum()) > allowed:
                raise ValueError(
                    f"{name} has {int(blocks.sum())} blocks that are not zero, pattern {self} allows {allowed}"
                )
            return
        if self.m is None or self.n is None:
            # Row by row is the loosest exact count: ranking over wider scopes rounds down less often.
            allowed = weight.shape[0] * (weight.shape[1] - self.num_zeros(weight.shape[1]))
            found = int(nonzero.sum())
            if found > allowed:
                raise ValueError(f"{name} has {found} nonzero weights, pattern {self} allows {allowed}")
            return
        self.check_shape(weight.shape[0], weight.shape[1], name)
        counts = nonzero.unflatten(-1, (-1, self.m)).sum(-1)
        if bool((counts > self.n).any()):
            row, group = (int(i) for i in (counts > self.n).nonzero()[0])
            raise ValueError(
                f"{name}: row {row}, columns {group * self.m} to {(group + 1) * self.m - 1} hold "
                f"{int(counts[row, group])} nonzero weights, pattern {self} allows {self.n}"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        return self.n, self.m, self.block, self.sparsity

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


def in_blocks(matrix: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[..., out, in] as [..., out/r, in/c, r·c]: the weights of each block in a row."""
    rows, columns = block
    return matrix.unflatten(-2, (-1, rows)).unflatten(-1, (-1, columns)).transpose(-3, -2).flatten(-2)


def lowest_blocks(scores: torch.Tensor, count: int, block: tuple[int, int]) -> torch.Tensor:
    """Marks the weights of exactly `count` blocks of each matrix [..., out, in]: those with the lowest sums."""
    sums = in_blocks(scores, block).sum(-1, dtype=torch.float64)
    marks = lowest(sums.flatten(-2), count).view_as(sums)
    return marks.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)


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
