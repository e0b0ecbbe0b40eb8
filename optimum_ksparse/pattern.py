"""The sparsity pattern as a value object: parsing, masks and verification.

Words: in ``n:m`` at most ``n`` of every ``m`` consecutive weights along the input dimension are NONZERO (the
hardware's convention). ``"50%"`` and ``"0.5"`` are a sparsity: the fraction of ZEROS. ``"50%/32x32"`` is that fraction
of whole tiles of 32 outputs x 32 inputs.
"""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import torch

_ALLOWED = (
    'allowed: "n:m" with 0 < n < m (n nonzero weights in every m), such as "2:4" or "4:8"; '
    'or the fraction of zeros between 0 and 1, both excluded, such as "50%", "62.5%" or 0.5; '
    'or that fraction of whole tiles of r outputs x c inputs, "50%/rxc" such as "50%/32x32"'
)

_GROUP = re.compile(r"([0-9]{1,6}):([0-9]{1,6})")
_SHARE = re.compile(
    r"(?P<number>[0-9]{1,12}/[0-9]{1,12}(?!%)|[0-9]{0,3}(\.[0-9]{1,20})?)(?P<percent>%)?"
    r"(/(?P<rows>[0-9]{1,6})x(?P<columns>[0-9]{1,6}))?"
)
# Up to this group size, comparing every pair of positions is several times faster than sorting each group.
_PAIRWISE_LIMIT = 32


def default_pattern() -> tuple[str, str]:
    """The pattern where none is asked for, and the reason: half of the weights, where this machine is fast."""
    if torch.cuda.is_available():
        return "2:4", "of the patterns that GPUs multiply fast it is the one that their hardware knows"
    return "50%", "on a CPU every pattern takes the same bytes and time, and this one loses least"


class Pattern:
    """Which weights may be nonzero.

    Args:
        pattern: `"n:m"` (`n` nonzero weights in every `m` consecutive ones of a row), or the fraction of zeros as a
            per cent (`"50%"`) or as a number between 0 and 1 (`"0.5"`, `0.5`, `"1/3"`), with `"/rxc"` behind it where
            tiles of r outputs x c inputs are kept or zeroed whole (`"50%/32x32"`). Another `Pattern` is copied.

    Attributes:
        n, m: the two numbers of `n:m`; None for other patterns.
        tile: (r, c) of a pattern of whole tiles; None for other patterns.
        sparsity: the exact fraction of zeros, a `fractions.Fraction`.

    Raises:
        TypeError: `pattern` is neither a string, a number nor a `Pattern`.
        ValueError: `pattern` is not one of the forms above.
    """

    __slots__ = ("m", "n", "sparsity", "text", "tile")

    def __init__(self, pattern: str | float | Pattern) -> None:
        if isinstance(pattern, bool) or not isinstance(pattern, str | float | int | Fraction | Pattern):
            raise TypeError(f"pattern must be a string or a number, found {type(pattern).__name__}; {_ALLOWED}")
        self.text = str(pattern).strip()
        self.n: int | None = None
        self.m: int | None = None
        self.tile: tuple[int, int] | None = None
        try:
            if group := _GROUP.fullmatch(self.text):
                self.n, self.m = int(group[1]), int(group[2])
                self.sparsity = 1 - Fraction(self.n, self.m)
            elif share := _SHARE.fullmatch(self.text):
                # Through the text, so that 0.29 means 29/100 and not the nearest binary fraction, which lies below it.
                self.sparsity = Fraction(share["number"]) / (100 if share["percent"] else 1)
                if share["rows"]:
                    self.tile = int(share["rows"]), int(share["columns"])
            else:
                raise ValueError
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"pattern={self.text!r} is not a pattern; {_ALLOWED}") from None
        if not 0 < self.sparsity < 1 or 0 in (self.tile or ()):
            raise ValueError(f"pattern={self.text!r} is out of range; {_ALLOWED}")

    @property
    def is_semi_structured(self) -> bool:
        """True for `n:m`."""
        return self.m is not None

    @property
    def density(self) -> float:
        """Fraction of weights that may be nonzero."""
        return float(1 - self.sparsity)

    @property
    def width(self) -> int:
        """Neighbouring input columns that are decided together: m, or c of a tile, otherwise 1."""
        return self.m or (self.tile or (1, 1))[1]

    def with_sparsity(self, sparsity: Fraction) -> Pattern:
        """A pattern with another share of zeros, unstructured or of the same tiles; it is rounded to a ten-thousandth
        of a per cent, so that its text is exact."""
        parts = min(max(round(sparsity * 1_000_000), 1), 999_999)
        tiles = "" if self.tile is None else f"/{self.tile[0]}x{self.tile[1]}"
        return Pattern(f"{parts / 10_000:.4f}".rstrip("0").rstrip(".") + "%" + tiles)

    def num_zeros(self, count: int) -> int:
        """Exact number of zeros among `count` weights of an unstructured pattern or of whole groups, or among `count`
        tiles: ⌊count·sparsity⌋."""
        return int(count * self.sparsity)

    def misfit(self, out_features: int, in_features: int) -> str | None:
        """Why a weight of this shape cannot have the pattern; None where it can."""
        if self.m is not None and in_features % self.m:
            return f"has {in_features} input features, which m={self.m} of pattern {self} does not divide"
        if self.tile is not None and (out_features % self.tile[0] or in_features % self.tile[1]):
            sizes = f"{self.tile[0]} must divide the outputs, {self.tile[1]} the inputs"
            return f"is {out_features} x {in_features}, which the tiles of pattern {self} do not fill ({sizes})"
        return None

    def check_shape(self, out_features: int, in_features: int, name: str = "weight") -> None:
        """Raises ValueError where the groups of `n:m` do not fill a row, or the tiles do not fill the weight."""
        reason = self.misfit(out_features, in_features)
        if reason is not None:
            raise ValueError(f"{name} {reason}")

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """Keeps the highest scores: of each group for `n:m`, of each row (the last dimension) where unstructured; of
        tiles those with the highest sums, over the whole matrix.

        Counts are exact: ties are broken by position, the earlier weight goes first.

        Args:
            scores: [..., out, in], any real dtype; but for tiles [..., in] will do.

        Returns:
            bool, of the same shape: True where the weight is kept.

        Raises:
            ValueError: a score is NaN, or groups or tiles do not fill the matrix.
        """
        if scores.is_floating_point() and bool(scores.isnan().any()):
            raise ValueError("scores contain NaN, so they have no order; check the weights and the calibration inputs")
        self.check_shape(scores.shape[-2] if self.tile else 1, scores.shape[-1], "scores")
        if self.tile is not None:
            number = scores.shape[-2] // self.tile[0] * (scores.shape[-1] // self.tile[1])
            return ~lowest_tiles(scores, self.num_zeros(number), self.tile)
        if self.m is None or self.n is None:
            return ~lowest(scores, self.num_zeros(scores.shape[-1]))
        groups = scores.unflatten(-1, (-1, self.m))
        if self.m <= _PAIRWISE_LIMIT:
            return (_ranks(groups) >= self.m - self.n).flatten(-2)
        return ~lowest(groups, self.m - self.n).flatten(-2)

    def mask_of_layer(self, scores: torch.Tensor) -> torch.Tensor:
        """As `mask`, of scores [out, in], but an unstructured pattern is ranked over the whole matrix."""
        if self.is_semi_structured or self.tile is not None:
            return self.mask(scores)
        return self.mask(scores.reshape(1, -1)).view_as(scores)

    def verify(self, weight: torch.Tensor, name: str = "weight") -> None:
        """Checks that `weight` [out, in] has no more nonzero weights than the pattern allows.

        Raises:
            ValueError: names `name`, where the pattern is broken and by how much.
        """
        self.check_shape(weight.shape[0], weight.shape[1], name)
        nonzero, what = weight != 0, "nonzero weights"
        if self.m is not None and self.n is not None:
            counts = nonzero.unflatten(-1, (-1, self.m)).sum(-1)
            if len(over := (counts > self.n).nonzero()):
                row, group = over[0].tolist()
                raise ValueError(
                    f"{name}: row {row}, columns {group * self.m} to {(group + 1) * self.m - 1} hold "
                    f"{int(counts[row, group])} nonzero weights, pattern {self} allows {self.n}"
                )
            return
        if self.tile is not None:
            nonzero, what = in_tiles(nonzero, self.tile).any(-1), "tiles that are not zero"
            zeros = self.num_zeros(nonzero.numel())
        else:  # Row by row is the loosest exact count: ranking over wider scopes rounds down less often.
            zeros = weight.shape[0] * self.num_zeros(weight.shape[1])
        count, allowed = int(nonzero.sum()), nonzero.numel() - zeros
        if count > allowed:
            raise ValueError(f"{name} has {count} {what}, pattern {self} allows {allowed}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        return self.n, self.m, self.tile, self.sparsity

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


def in_tiles(matrix: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """[..., out, in] as [..., out/r, in/c, r·c]: the weights of each tile in a row."""
    rows, columns = tile
    return matrix.unflatten(-2, (-1, rows)).unflatten(-1, (-1, columns)).transpose(-3, -2).flatten(-2)


def lowest_tiles(scores: torch.Tensor, count: int, tile: tuple[int, int]) -> torch.Tensor:
    """Marks the weights of exactly `count` tiles of each matrix [..., out, in]: those with the lowest sums."""
    sums = in_tiles(scores, tile).sum(-1, dtype=torch.float64)
    marks = lowest(sums.flatten(-2), count).view_as(sums)
    return marks.repeat_interleave(tile[0], -2).repeat_interleave(tile[1], -1)


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
