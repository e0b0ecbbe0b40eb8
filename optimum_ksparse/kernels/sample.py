"""Random packed weights, to time kernels on."""

from __future__ import annotations

import itertools

import torch

from .candidates import PackedWeight, Problem


def sample_weights(problem: Problem, copies: int) -> list[PackedWeight]:
    """Random weights of a problem's shape, pattern (2:4 or 4:8) and dtype; `copies` that lie apart in memory."""
    rows, columns = problem.out_features, problem.in_features
    generator = torch.Generator(problem.device).manual_seed(0)
    random = {"device": problem.device, "generator": generator}
    values = torch.randn(rows, columns // 2, **random).to(problem.dtype)  # type: ignore[call-overload]
    masks = torch.tensor(_masks(problem.pattern), dtype=torch.uint8, device=problem.device)
    bits = masks[torch.randint(len(masks), (rows, -(-columns // 8)), **random)]  # type: ignore[call-overload]
    if columns % 8:
        bits[:, -1] &= 15  # half a byte of padding
    first = PackedWeight(values, bits, columns, problem.pattern)
    others = [first._replace(values=values.clone(), bits=bits.clone()) for _ in range(copies - 1)]
    return [first, *others]


def _masks(pattern: str) -> list[int]:
    """All mask bytes of 2:4 and of 4:8."""
    if pattern == "4:8":
        return [sum(1 << place for place in places) for places in itertools.combinations(range(8), 4)]
    nibbles = [(1 << low) | (1 << high) for low, high in itertools.combinations(range(4), 2)]
    return [low | high << 4 for low in nibbles for high in nibbles]
