"""Recognising what a model is that was pruned elsewhere: each layer's pattern, from the zeros of its weight."""

from __future__ import annotations

import torch
from torch import nn

from ..checkpoint.bitmask import found_pattern
from ..nn import SparseExperts, SparseLinear
from ..pruners import METHODS
from ..pruners.allocation import Allocation
from ..pruners.existing import NOT_SPARSE, commonest
from .job import Job
from .loop import over_blocks
from .sensitivity import leave_dense
from .targets import Layer, weight_of


class NotSparseError(ValueError):
    """No layer of a model has the zeros that are to be kept."""


@torch.no_grad()
def recognise_patterns(job: Job) -> None:
    """Gives each layer of the job its pattern, the job's settings the commonest one, and leaves layers dense that are
    not sparse. One that is packed already stays packed.

    Raises:
        NotSparseError: none is.
    """

    def step(index: int, block: nn.Module) -> list[tuple[str, str | None]]:
        layers = {job.blocks.name_in_decoder(index, name): layer for name, layer in job.targets[index].items()}
        return job.processes.once(lambda: [(path, _pattern(job, layer)) for path, layer in layers.items()])

    def measure() -> Allocation:
        patterns = dict(over_blocks("Recognising patterns", job, None, step))
        if not any(patterns.values()):
            name = type(job.place.model).__name__
            raise NotSparseError(f"no layer of {name} is sparse, all weights are dense: prune it by another method")
        return Allocation(patterns, {})

    job.allocation = job.place.measured("patterns", Allocation, measure)
    patterns = [pattern for pattern in job.allocation.patterns.values() if pattern is not None]
    job.config = job.config.changed(pattern=commonest(patterns))
    job.skipped |= leave_dense(job.blocks, job.targets, job.allocation, NOT_SPARSE)


def _pattern(job: Job, layer: Layer) -> str | None:
    recognise = METHODS[job.config.method].recognise
    assert recognise is not None
    if isinstance(layer, SparseExperts):
        return str(layer.pattern)
    pattern = found_pattern(layer) if isinstance(layer, SparseLinear) else recognise(weight_of(layer))
    return None if pattern is None else str(pattern)
