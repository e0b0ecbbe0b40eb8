"""Pruning a stack of matrices, one by one, each with the statistics of the tokens that were routed to it."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass

import torch

from .calibration import ExpertStack
from .calibration.experts import matrix_name
from .checkpoint import aligned
from .config import SparsityConfig
from .nn import SparseExperts
from .nn.packing import pack
from .pattern import Pattern
from .pruners import METHODS
from .report import LayerReport
from .statistics import ColumnNorms

MIN_TOKENS = 32


def unsupported_stack(stack: ExpertStack, pattern: Pattern, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why a stack of matrices cannot be pruned; None where it can."""
    with aligned(stack.owner):
        weight = stack.weight
        what = f"it is one parameter {list(weight.shape)}, a stack of matrices (such as experts fused into one tensor)"
        reading = f"read it as F.linear(x, self.{stack.name}[expert])"
        if weight.dim() != 3 or not stack.reads_matrices():
            return (
                f"{what}, and {type(stack.owner).__name__} does not {reading}: its matrices may be stored transposed, or "
                "multiplied all at once"
            )
        if weight.dtype not in dtypes:
            return f"{what} in {weight.dtype}; supported: float32, bfloat16, float16"
        if pattern.m is not None and weight.shape[-1] % pattern.m:
            return (
                f"{what} with {weight.shape[-1]} input features, which m={pattern.m} of pattern {pattern} does not "
                "divide"
            )
        return None if bool(weight.isfinite().all()) else "its weight holds NaN or Inf"


def own_statistics(
    name: str, stack: ExpertStack, statistics: MutableMapping[str, ColumnNorms]
) -> list[ColumnNorms | None]:
    """Takes from all statistics those of the matrices of the stack `name`; None for a matrix that no token reached."""
    return [statistics.pop(matrix_name(name, expert), None) for expert in range(len(stack.weight))]


def prune_stack(
    path: str, stack: ExpertStack, statistics: list[ColumnNorms | None], config: SparsityConfig
) -> tuple[SparseExperts, LayerReport]:
    """Prunes each matrix of a stack.

    Args:
        path: of the stack in the decoder.
        stack: of the dense model; is not changed.
        statistics: of each matrix; emptied on the way, because a Gram matrix and its factor are large. With fewer than
            `MIN_TOKENS` tokens those of all matrices together take the place of its own.
        config: method, pattern and settings.

    Returns:
        The packed stack, and a row that reports its matrices as one, below each other.

    Raises:
        ValueError: inputs are NaN or Inf; names the matrix.
        ArithmeticError: a Gram matrix stays singular; names the matrix.
    """
    pattern, started, error = Pattern(config.pattern), time.perf_counter(), _OutputError()
    notes: dict[str, list[int]] = {}
    few = [] if METHODS[config.method].statistics is None else _few(statistics)
    shared = _shared(statistics) if few else None

    def pairs(weight: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for expert, matrix in enumerate(weight):
            own, used = statistics[expert], shared if expert in few else statistics[expert]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                pruned, mask = _prune(matrix_name(path, expert), matrix, used, config)
            for message in dict.fromkeys(str(warning.message) for warning in caught):
                notes.setdefault(message, []).append(expert)
            if own is not None:
                error.add(own.sample, matrix, pruned)
            statistics[expert] = None
            yield pack(pruned, mask, pattern)

    with aligned(stack.owner):
        weight = stack.weight
        in_features = weight.shape[-1]
        sparse = SparseExperts.from_packed(pairs(weight.detach()), in_features, pattern, weight.requires_grad)
    sparse.train(stack.owner.training)
    if few:
        too_few = f"fewer than {MIN_TOKENS} calibration tokens each, pruned with the statistics of all experts' tokens"
        notes = {too_few: few, **notes}
    row = LayerReport(
        name=path,
        shape=(sparse.num_experts * sparse.out_features, in_features),
        pattern=str(pattern),
        num_values=sparse.weight.numel(),
        dense_bytes=sparse.dense_bytes,
        packed_bytes=sparse.packed_bytes,
        relative_output_error=error.relative(),
        seconds=round(time.perf_counter() - started, 4),
        note="; ".join(f"experts {', '.join(map(str, experts))}: {note}" for note, experts in notes.items()),
    )
    return sparse, row


def _few(statistics: list[ColumnNorms | None]) -> list[int]:
    """Numbers of the matrices with too few tokens for statistics of their own."""
    return [expert for expert, own in enumerate(statistics) if own is None or own.num_tokens < MIN_TOKENS]


def _shared(statistics: list[ColumnNorms | None]) -> ColumnNorms:
    """Statistics of all tokens that reached a matrix, counted once for each that they reached."""
    found = [own for own in statistics if own is not None]
    return type(found[0]).merged(found)


def _prune(
    name: str, matrix: torch.Tensor, statistics: ColumnNorms | None, config: SparsityConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    if statistics is not None and not bool(statistics.squared_norms.isfinite().all()):
        raise ValueError(f"{name}: its inputs hold NaN or Inf; load the model in float32 or bfloat16")
    method = METHODS[config.method]
    settings = {setting: getattr(config, setting) for setting in method.settings}
    try:
        return method.prune(matrix, statistics, Pattern(config.pattern), **settings)
    except ArithmeticError as error:
        raise ArithmeticError(f"{name}: {error}") from error


@dataclass
class _OutputError:
    """‖X(Ŵ − W)ᵀ‖_F / ‖XWᵀ‖_F over several matrices, each with inputs of its own, computed in float32."""

    difference: float = 0.0
    dense: float = 0.0

    def add(self, inputs: torch.Tensor, weight: torch.Tensor, pruned: torch.Tensor) -> None:
        x = inputs.to(weight.device, torch.float32)
        self.dense += float((x @ weight.float().T).square().sum())
        self.difference += float((x @ (pruned.float() - weight.float()).T).square().sum())

    def relative(self) -> float | None:
        return math.sqrt(self.difference / self.dense) if self.dense > 0 else None
