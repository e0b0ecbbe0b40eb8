"""Orders of channels that a block leaves free: which columns of a linear map may change places, if rows of those that
feed it do, found from what the block computes and not from names.

A column of the reader is fed by one row of each of its writers where everything in between is elementwise: rows of
gate and up by columns of down, rows of v by columns of o. Attention is so at the first position, which sees itself
alone. Which columns may be exchanged with each other (those of one head) is then tried at all positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..nn import dense_weight

_FREE, _MIXED = -1, -2
_Run = Callable[[], torch.Tensor]
_Writer = tuple[str, int, int]  # name, and its rows from … to


@dataclass
class FreeOrder:
    """An order of channels that changes nothing.

    Attributes:
        columns: [classes, channels, copies] of the reader's input: the channels of a class may change places, each
            with all its copies (as many as query heads share a value head).
        rows: of each writer by name, [classes, channels, copies] of its output: those that feed the columns.
    """

    columns: torch.Tensor
    rows: list[tuple[str, torch.Tensor]]

    def split(self, classes: int) -> FreeOrder:
        """The same channels in so many classes."""
        shape = (classes, -1, self.columns.shape[-1])
        return FreeOrder(self.columns.reshape(shape), [(name, rows.reshape(shape)) for name, rows in self.rows])

    @torch.no_grad()
    def apply(self, layers: Mapping[str, nn.Module], reader: str, places: torch.Tensor) -> None:
        """Channel i of each class becomes what channel `places[class, i]` was; `places` is [classes, channels]."""
        weight = dense_weight(layers[reader])
        weight[:, self.columns.flatten()] = weight[:, _taken(self.columns, places)]
        for name, rows in self.rows:
            for tensor in (dense_weight(layers[name]), getattr(layers[name], "bias", None)):
                if tensor is not None:
                    tensor[rows.flatten()] = tensor[_taken(rows, places)]


def _taken(indices: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return indices.gather(1, places.to(indices.device)[..., None].expand_as(indices)).flatten()


@torch.no_grad()
def find_free_orders(run: _Run, layers: Mapping[str, nn.Module], readers: list[str]) -> dict[str, FreeOrder]:
    """The free orders of the inputs of `readers`, some of the linear maps `layers` of a block, by name.

    Args:
        run: runs the block on the same samples each time, [samples, positions]; gives what it adds to its input.
    """
    fed: dict[str, list[tuple[str, torch.Tensor]]] = {reader: [] for reader in readers}

    def look(writer: _Writer, at: list[str]) -> dict[str, torch.Tensor]:
        found = _sources(run, layers, writer, at)
        for reader, sources in found.items():
            if bool((sources >= 0).all()):
                fed[reader].append((writer[0], sources))
        return found

    for name, layer in layers.items():
        outputs = dense_weight(layer).shape[0]
        for reader, sources in look((name, 0, outputs), readers).items():
            width = len(sources)  # gate and up may be one map, whose rows feed a column in pairs
            if bool((sources == _MIXED).any()) and outputs > width and outputs % width == 0:
                for start in range(0, outputs, width):
                    look((name, start, start + width), [reader])
    orders = {}
    for reader in readers:
        order = _joined(fed[reader])
        found = None if order is None else _tried(run, layers, reader, order)
        if found is not None:
            orders[reader] = found
    return orders


def _sources(
    run: _Run, layers: Mapping[str, nn.Module], writer: _Writer, readers: list[str]
) -> dict[str, torch.Tensor]:
    """For each column of each reader the one row of the writer that feeds it at the first position; `_FREE` where none
    does, `_MIXED` where several do. Rows are told apart by the binary digits of their numbers: those with a digit 1
    are disturbed, then those with 0."""
    name, start, stop = writer
    before = _first_inputs(run, layers, readers)
    found = {reader: torch.zeros(dense_weight(layers[reader]).shape[1], dtype=torch.int64) for reader in readers}
    touched = {reader: torch.zeros(len(found[reader]), dtype=torch.bool) for reader in readers}
    mixed = {reader: torch.zeros(len(found[reader]), dtype=torch.bool) for reader in readers}
    rows = torch.arange(dense_weight(layers[name]).shape[0])
    for digit in range(max(1, math.ceil(math.log2(stop - start)))):
        changed = {}
        for value in (0, 1):
            disturbed = (rows >= start) & (rows < stop) & ((rows - start >> digit & 1) == value)
            with _disturbed(layers[name], disturbed):
                after = _first_inputs(run, layers, readers)
            changed[value] = {reader: _differs(before.get(reader), after.get(reader)) for reader in readers}
        for reader in readers:
            zero, one = changed[0][reader], changed[1][reader]
            if zero is None or one is None:
                mixed[reader][:] = True
            else:
                found[reader] += one << digit
                touched[reader] |= zero | one
                mixed[reader] |= zero & one
    for reader in readers:
        found[reader] += start
        found[reader][~touched[reader]] = _FREE
        found[reader][mixed[reader]] = _MIXED
    return found


def _differs(before: torch.Tensor | None, after: torch.Tensor | None) -> torch.Tensor | None:
    """By column whether they differ; None where they cannot be compared."""
    return None if before is None or after is None else (before != after).any(0).cpu()


def _first_inputs(run: _Run, layers: Mapping[str, nn.Module], names: list[str]) -> dict[str, torch.Tensor]:
    """Inputs of the layers at the first position, [samples, in]; without those that only some positions reach."""
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        layers[name].register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].clone()))
        for name in names
    ]
    try:
        shape = run().shape[:2]
    finally:
        for hook in hooks:
            hook.remove()
    full = {name: x for name, x in inputs.items() if x.numel() == shape.numel() * x.shape[-1]}
    return {name: x.reshape(*shape, -1)[:, 0] for name, x in full.items()}


@contextmanager
def _disturbed(layer: nn.Module, rows: torch.Tensor) -> Iterator[None]:
    """Within it these outputs of a layer are others, by about their size."""

    def disturb(_: nn.Module, args: object, output: Any) -> Any:
        if not isinstance(output, torch.Tensor):  # of a router that is a linear map and gives its choice (Llama 4)
            return output
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(output.shape, generator=generator).to(output) * output.std().clamp(min=1e-3)
        return torch.where(rows.to(output.device), output + 2 * noise, output)

    hook = layer.register_forward_hook(disturb)
    try:
        yield
    finally:
        hook.remove()


def _joined(fed: list[tuple[str, torch.Tensor]]) -> FreeOrder | None:
    """One class of channels, each fed by rows of its own; None where nothing feeds all columns, or copies differ in
    number."""
    if not fed:
        return None
    sources = min((rows for _, rows in fed), key=lambda rows: len(rows.unique()))
    channels = [(sources == row).nonzero().flatten() for row in sources.unique()]
    if len({len(columns) for columns in channels}) > 1:
        return None
    channels.sort(key=lambda columns: int(columns[0]))
    columns = torch.stack(channels)
    for _, rows in fed:  # a row feeds one channel alone
        pairs = torch.stack([rows[columns], torch.arange(len(columns))[:, None].expand_as(columns)]).flatten(1)
        if len(pairs.unique(dim=1).T) != len(pairs[0].unique()):
            return None
    return FreeOrder(columns[None], [(name, rows[columns][None]) for name, rows in fed])


def _tried(run: _Run, layers: Mapping[str, nn.Module], reader: str, order: FreeOrder) -> FreeOrder | None:
    """The order in the fewest classes of neighbours that changes nothing; None where every one does."""
    channels = order.columns.shape[1]
    for classes in range(1, channels // 2 + 1):
        if channels % classes == 0:
            tried = order.split(classes)
            generator = torch.Generator().manual_seed(0)
            places = torch.stack([torch.randperm(channels // classes, generator=generator) for _ in range(classes)])
            if changes_nothing(run, layers, reader, partial(tried.apply, layers, reader, places)):
                tried.apply(layers, reader, places.argsort(1))
                return tried
            tried.apply(layers, reader, places.argsort(1))
    return None


def changes_nothing(run: _Run, layers: Mapping[str, nn.Module], reader: str, change: Callable[[], None]) -> bool:
    """Whether `change`, which it makes, leaves the outputs of the block and of the reader as they are, up to rounding:
    a wrong one changes the reader's by about their size."""
    outputs: list[torch.Tensor] = []
    hook = layers[reader].register_forward_hook(lambda _, args, output: outputs.append(output.clone()))
    try:
        added = [run()]
        change()
        added.append(run())
    finally:
        hook.remove()
    pairs = [added, outputs]
    tolerance = math.sqrt(torch.finfo(added[0].dtype).eps)
    return all(len(p) == 2 and bool((p[0] - p[1]).norm() <= tolerance * p[0].norm()) for p in pairs)
