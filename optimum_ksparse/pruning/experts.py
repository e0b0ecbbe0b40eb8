"""Pruning a stack of matrices, one by one, each with the statistics of the tokens that were routed to it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, MutableMapping

import torch

from ..blocks import ExpertStack
from ..blocks.experts import matrix_name
from ..config import SparsityConfig
from ..nn import SparseExperts
from ..packing import pack
from ..pattern import Pattern
from ..pruners import collected_notes
from ..pruners.statistics import ColumnNorms
from ..report import LayerReport
from .layer import make_row, prune_matrix


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
            `min_tokens` tokens those of all matrices together take the place of its own.
        config: method, pattern and settings.

    Returns:
        The packed stack, and a row that reports its matrices as one, below each other.

    Raises:
        ValueError: inputs are NaN or Inf; names the matrix.
        ArithmeticError: a Gram matrix stays singular; names the matrix.
    """
    started, run = time.perf_counter(), _Run(path, statistics, config)
    weight, pattern = stack.weight, Pattern(config.pattern)
    sparse = SparseExperts.from_packed(run.packed(weight), weight.shape[-1], pattern, weight.requires_grad)
    note = "; ".join(f"experts {', '.join(map(str, experts))}: {note}" for note, experts in run.notes.items())
    row = make_row(path, sparse, run.relative_output_error, started, note)
    return sparse.train(stack.owner.training), row


class _Run:
    """The matrices of one stack on their way, and what the report says of them.

    Attributes:
        notes: what is to be said → numbers of the experts.
        relative_output_error: ‖X(Ŵ − W)ᵀ‖_F / ‖XWᵀ‖_F over all matrices, each with its own inputs; None without data.
    """

    def __init__(self, path: str, statistics: list[ColumnNorms | None], config: SparsityConfig) -> None:
        self._path, self._statistics, self._config = path, statistics, config
        self.notes: dict[str, list[int]] = {}
        self._difference = self._dense = 0.0
        kind = config.statistics
        least = 0 if kind is None else kind.min_tokens
        self._few = [i for i, own in enumerate(statistics) if least and (own is None or own.num_tokens < least)]
        self._shared = _shared(statistics) if self._few else None
        if self._few:
            few = f"fewer than {least} calibration tokens each, pruned with the statistics of all experts' tokens"
            self.notes[few] = self._few

    def packed(self, weight: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Prunes and packs one matrix of `weight` [experts, out, in] after the other."""
        for expert, matrix in enumerate(weight.detach()):
            own = self._statistics[expert]
            with collected_notes() as notes:
                seen = self._shared if expert in self._few else own
                pruned, mask = prune_matrix(matrix_name(self._path, expert), matrix, seen, self._config)
            for message in notes:
                self.notes.setdefault(message, []).append(expert)
            if own is not None:
                self._measure(own.sample, matrix, pruned)
            self._statistics[expert] = own = None
            yield pack(pruned, mask, Pattern(self._config.pattern))

    def _measure(self, inputs: torch.Tensor, weight: torch.Tensor, pruned: torch.Tensor) -> None:
        x = inputs.to(weight.device, torch.float32)
        dense = x @ weight.float().T
        self._dense += float(dense.square().sum())
        self._difference += float((x @ pruned.float().T - dense).square().sum())

    @property
    def relative_output_error(self) -> float | None:
        return None if self._dense == 0 else math.sqrt(self._difference / self._dense)


def _shared(statistics: list[ColumnNorms | None]) -> ColumnNorms:
    """Statistics of all tokens that reached a matrix, counted once for each that they reached."""
    found = [own for own in statistics if own is not None]
    return type(found[0]).merged(found)
