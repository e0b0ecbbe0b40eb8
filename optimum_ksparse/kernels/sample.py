"""Random packed weights, to time kernels on."""

from __future__ import annotations

import torch

from ..packing import pack
from ..pattern import Pattern
from .candidates import PackedWeight, Problem

_ROWS = 256  # that are drawn; others repeat them


def sample_weights(problem: Problem, copies: int) -> list[PackedWeight]:
    """Random weights of a problem's shape, pattern and dtype; `copies` that lie apart in memory."""
    rows, columns, pattern = problem.out_features, problem.in_features, Pattern(problem.pattern)
    repeats = 1 if rows % _ROWS or _ROWS % (pattern.tile or (1, 1))[0] else rows // _ROWS
    generator = torch.Generator(problem.device).manual_seed(0)
    drawn = torch.randn(rows // repeats, columns, device=problem.device, generator=generator)
    values, bits = pack(drawn.to(problem.dtype), pattern.mask(drawn.abs()), pattern)
    values = values.repeat(repeats, 1) if values.dim() == 2 else values.repeat(repeats)
    first = PackedWeight(values, bits.repeat(repeats, 1), columns, problem.pattern)
    others = [first._replace(values=first.values.clone(), bits=first.bits.clone()) for _ in range(copies - 1)]
    return [first, *others]
