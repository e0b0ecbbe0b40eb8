"""Reordering channels before pruning, `permute="free"`: where an order is free, the one that n:m loses least by."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from functools import partial

import torch
from torch import nn

from ..blocks import BlockReplay
from ..blocks.free import FreeOrder, changes_nothing, find_free_orders
from ..nn import dense_weight, is_linear_map
from ..pattern import Pattern
from ..pruners.order import best_order, importance
from ..pruners.statistics import ColumnNorms
from .job import Job
from .targets import Layer

_SAMPLES, _POSITIONS = 16, 8
_Collect = Callable[[dict[str, Layer]], dict[str, ColumnNorms]]


class Permutation:
    """The free orders of a model's blocks, found before any is pruned.

    Raises:
        ValueError: blocks share more than hidden states, or no order is free.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        vocabulary = len(job.place.model.get_input_embeddings().weight)  # type: ignore[arg-type]
        ids = torch.randint(vocabulary, (_SAMPLES, _POSITIONS), generator=torch.Generator().manual_seed(0))
        self._replay = BlockReplay(job.blocks, ids, _SAMPLES, resident=job.place.resident)
        kind = type(job.place.model).__name__
        if self._replay.has_states:
            raise ValueError(
                f"permute='free': the blocks of {kind} share more than hidden states, or are not called one after "
                "another, so that no order of channels in one of them is known to be free: leave permute out"
            )
        self._orders: dict[Hashable, dict[str, FreeOrder]] = {}
        for index, layers in enumerate(job.targets):
            key = self._kind(index)
            if layers and key not in self._orders:
                with job.place.resident(index):
                    self._orders[key] = job.processes.once(partial(self._find, index))
        if not any(self._orders.values()):
            names = sorted({name for layers in job.targets for name in layers})
            raise ValueError(
                f"permute='free': no layer of {kind} has inputs in a free order, because what is between its layers "
                f"is not elementwise, or fits no group of the pattern: {', '.join(names)}; leave permute out"
            )

    @torch.no_grad()
    def __call__(self, index: int, collect: _Collect) -> dict[str, list[str]]:
        """Reorders channels of block `index`, which is resident and dense, by the statistics that `collect` gives of
        the inputs of some layers. Returns the names of those whose inputs have another order now, each with the
        names of those whose outputs have it."""
        job, layers = self._job, self._linears(index)
        orders = self._orders.get(self._kind(index), {})
        statistics = collect({name: job.targets[index][name] for name in orders})
        reordered: dict[str, list[str]] = {}
        for name, order in orders.items():
            pattern = Pattern(job.config_of(job.blocks.name_in_decoder(index, name)).pattern)
            places = job.processes.once(partial(_places, layers[name], order, statistics[name], pattern))
            if job.replaced is not None:
                changed = {name, *(writer for writer, _ in order.rows)}
                tensors = (tensor for writer in changed for tensor in layers[writer].parameters())
                job.replaced.tuned += [(tensor, tensor.data.clone()) for tensor in tensors]
            if changes_nothing(partial(self._run, index), layers, name, partial(order.apply, layers, name, places)):
                reordered[name] = list(dict.fromkeys(writer for writer, _ in order.rows))
            else:  # found in a block alike
                order.apply(layers, name, places.argsort(1))
        return reordered

    def _find(self, index: int) -> dict[str, FreeOrder]:
        job, layers = self._job, self._linears(index)
        readers = [name for name in job.targets[index] if name in layers]
        found = find_free_orders(partial(self._run, index), layers, readers)
        patterns = {name: Pattern(job.config_of(job.blocks.name_in_decoder(index, name)).pattern) for name in found}
        return {name: order for name, order in found.items() if _fits(order, patterns[name])}

    def _run(self, index: int) -> torch.Tensor:
        """What the block adds to the hidden states."""
        return self._replay.output(index, self._job.blocks.blocks[index], 0) - self._replay.hidden[0]

    def _linears(self, index: int) -> dict[str, nn.Module]:
        """The linear maps of a block that no other one shares."""
        own = {id(module) for module in self._job.blocks.blocks[index].modules()}
        others = (m for i, block in enumerate(self._job.blocks.blocks) if i != index for m in block.modules())
        shared = {id(m) for m in others if id(m) in own}
        modules = self._job.blocks.blocks[index].named_modules()
        return {name: m for name, m in modules if is_linear_map(m) and id(m) not in shared}

    def _kind(self, index: int) -> Hashable:
        block, targets = self._job.blocks.blocks[index], self._job.targets[index]
        shapes = ((name, type(m), *_shapes(m.parameters(recurse=False))) for name, m in block.named_modules())
        return (tuple(shapes), tuple(targets))


def _shapes(tensors: Iterable[torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


def _fits(order: FreeOrder, pattern: Pattern) -> bool:
    """Whether the channels of each class, and each copy of them, are whole groups of neighbours, and several."""
    columns = order.columns.transpose(1, 2)  # [classes, copies, channels]
    neighbours = (columns.diff(dim=-1) == 1).all() and (columns[..., 0] % pattern.width == 0).all()
    return bool(neighbours) and columns.shape[-1] % pattern.width == 0 and columns.shape[-1] > pattern.width


def _places(layer: nn.Module, order: FreeOrder, statistics: ColumnNorms, pattern: Pattern) -> torch.Tensor:
    """For each class the channel that each place takes, [classes, channels]."""
    assert pattern.n is not None and pattern.m is not None
    scores = importance(dense_weight(layer), statistics)
    by_class = scores[:, order.columns].permute(1, 0, 3, 2).flatten(1, 2)  # [classes, out · copies, channels]
    return torch.stack([best_order(one, pattern.n, pattern.m) for one in by_class]).cpu()
