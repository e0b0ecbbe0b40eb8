"""Mean and deviation of a figure over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """`mean` and sample standard `deviation` (n − 1 in the denominator; None for one value, or where one is infinite)
    of `count` values."""

    mean: float
    deviation: float | None
    count: int

    def text(self, digits: int) -> str:
        """As tables have it."""
        mean = f"{self.mean:,.{digits}f}" if math.isfinite(self.mean) else "∞"
        return mean if self.deviation is None else f"{mean} ± {self.deviation:,.{digits}f}"


def spread(values: Sequence[float]) -> Spread:
    """Mean and deviation of at least one value."""
    if not all(map(math.isfinite, values)):
        return Spread(math.inf, None, len(values))
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, len(values))
