"""A block's forward passes with all batches side by side: they wait for each other at each layer, until it is pruned,
and go on with the pruned one. So a single pass gives each layer the inputs that it will have in the pruned model, and
the next block its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from ..nn import densified
from ..pruners.statistics import ColumnNorms
from .coroutine import Coroutine
from .replay import BlockReplay
from .running import replaced_forward
from .watch import identity


class OutOfStepError(Exception):
    """A layer is called with inputs that its statistics lack: it was pruned before they were there."""


class InStep:
    """The batches on their way through a block. A context manager, which ends all passes that are not at their end.

    Args:
        replay: the calibration activations at the block, which has the number `index`; stay as they are.
        layers: linear maps of `block` by name, whose places the caller gives to pruned ones.
        groups: all their names, those together that one tensor feeds, in the order in which they are called.
    """

    def __init__(
        self,
        replay: BlockReplay,
        index: int,
        block: nn.Module,
        layers: Mapping[str, nn.Module],
        groups: Sequence[Sequence[str]],
    ) -> None:
        self._replay, self._block, self._layers, self._groups = replay, block, layers, groups
        self._group_of = {name: number for number, group in enumerate(groups) for name in group}
        self._run = lambda batch: lambda: replay.output(index, block, batch)
        self._batches: list[_Batch] = []
        self._stack = ExitStack()
        self._pruned = 0  # groups
        self._running: _Batch | None = None

    def __enter__(self) -> Self:
        with self._stack:
            names = list(self._group_of)
            modules = [self._layers[name] for name in names]
            self._stack.enter_context(replaced_forward(modules, lambda i: self._waiting(names[i], modules[i])))
            for number in range(len(self._replay.hidden)):
                coroutine = Coroutine(self._run(number), self._replay.hidden.device)
                self._stack.callback(coroutine.end)
                self._batches.append(_Batch(number, coroutine))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def collect(self, make: Callable[[nn.Module], ColumnNorms]) -> dict[str, ColumnNorms]:
        """Lets all batches run to the next group that is not pruned, past those that are, and gives the statistics of
        its inputs by layer name; none where no batch calls it.

        Raises:
            OutOfStepError: the block does not call its layers in this order, each with one tensor.
        """
        group, statistics = self._groups[self._pruned], None
        for batch in self._batches:
            self._go_on(batch)
            if batch.waits_at == self._pruned and batch.x is not None:
                statistics = make(self._layers[group[0]]) if statistics is None else statistics
                statistics.update(self._replay.counted(batch.number, batch.x))
                batch.x = None
        return {} if statistics is None else dict.fromkeys(group, statistics)

    def is_pruned(self) -> None:
        """Says that the layers of that group are in their places."""
        for name in self._groups[self._pruned]:
            module = self._block.get_submodule(name)
            self._stack.enter_context(densified(module, self._replay.dtype))
            self._stack.callback(module.register_forward_pre_hook(partial(self._check, name)).remove)
        self._pruned += 1

    def finish(self) -> list[torch.Tensor]:
        """The outputs of the block, whose layers are all pruned; raises as `collect`."""
        for batch in self._batches:
            self._go_on(batch)
        return [batch.coroutine.result for batch in self._batches]

    def _go_on(self, batch: _Batch) -> None:
        if batch.waits_at < self._pruned:
            self._running = batch
            if not batch.coroutine.resume():
                batch.waits_at = len(self._groups)

    def _waiting(self, name: str, layer: nn.Module) -> Callable[..., Any]:
        """The forward of a layer: waits until another is in its place, and calls that."""
        original, group = layer.forward, self._group_of[name]

        def forward(x: torch.Tensor) -> Any:
            batch = self._running
            if not x.numel():  # an expert that is called without tokens
                return original(x)
            assert batch is not None
            if group >= self._pruned:
                batch.waits_at, batch.x = group, x
                batch.fed[group] = _Fed(x, identity(x), set(self._groups[group]))
                batch.coroutine.pause()
            return self._block.get_submodule(name)(x)

        return forward

    def _check(self, name: str, layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Before a pruned layer runs: its input must be one that was counted, with which a layer of the group
        waited."""
        group, x = self._group_of[name], args[0]
        if x.numel() and self._running is not None:
            fed = self._running.fed.get(group)
            if fed is None or fed.identity != identity(x):
                raise OutOfStepError(name)
            fed.layers.discard(name)
            if not fed.layers:
                del self._running.fed[group]


class _Batch:
    """One batch on its way.

    Attributes:
        waits_at: number of the group; -1 at the beginning, that after the last at the end.
        x: the input that it waits with, until that is counted.
        fed: the inputs of groups of which it has still to call a layer.
    """

    def __init__(self, number: int, coroutine: Coroutine) -> None:
        self.number, self.coroutine, self.waits_at = number, coroutine, -1
        self.x: torch.Tensor | None = None
        self.fed: dict[int, _Fed] = {}


@dataclass
class _Fed:
    """The tensor that feeds a group, what it was then, and the layers that are still to be called with it."""

    x: torch.Tensor
    identity: tuple[Any, ...]
    layers: set[str]
