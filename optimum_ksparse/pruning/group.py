"""Pruning layers of a block with the statistics of their inputs, shared out over processes."""

from __future__ import annotations

from collections.abc import Mapping

from ..blocks import ExpertStack
from ..blocks.experts import observable
from ..checkpoint import SparseModule, empty_like, replace_module
from ..checkpoint.bitmask import take_pattern
from ..config import SparsityConfig
from ..nn import SparseLinear
from ..pattern import Pattern
from ..pruners.statistics import ColumnNorms, GramMatrix
from ..report import LayerReport
from .distributed import Processes
from .job import Job
from .layer import prune_layer, row_of
from .targets import Layer, weight_of

_Pruned = tuple[SparseModule, LayerReport]


def prune_group(
    job: Job, index: int, layers: Mapping[str, Layer], statistics: dict[str, ColumnNorms]
) -> list[LayerReport]:
    """Puts pruned layers in the places of some of block `index`, and gives their rows. The statistics of their inputs,
    over the samples of all processes, are taken out on the way."""
    rows, processes = [], job.processes
    packed = {name: layer for name, layer in layers.items() if isinstance(layer, SparseLinear)}  # by the source
    if job.config.values is not None:
        packed = {}  # their values are to be quantised
    for name, sparse_layer in packed.items():
        take_pattern(sparse_layer)
        rows.append(row_of(job.blocks.name_in_decoder(index, name), sparse_layer))
    layers = {name: layer for name, layer in layers.items() if name not in packed}
    costs = [_cost(layer, job.config) for layer in layers.values()]
    owners = dict(zip(layers, processes.owners(costs), strict=True))
    paths = {name: job.blocks.name_in_decoder(index, name) for name in layers}
    done: dict[str, _Pruned | Exception] = {}
    for name, layer in layers.items():
        if owners[name] != processes.rank:
            continue
        path = paths[name]
        try:
            inputs = [statistics.pop(matrix, None) for matrix in observable({name: layer})]
            done[name] = prune_layer(path, layer, inputs, job.config_of(path))
        except Exception as error:  # the others wait for this layer: they are told
            done[name] = error
            break
    for name, layer in layers.items():
        path = paths[name]
        sparse, row = _receive(done.get(name), layer, owners[name], job.config_of(path), processes)
        if job.replaced is not None:
            job.replaced.layers[path] = layer.weight if isinstance(layer, ExpertStack) else layer
        replace_module(job.blocks.decoder, path, sparse)
        rows.append(row)
    return rows


def _cost(layer: Layer, config: SparsityConfig) -> float:
    """About how long a layer takes to prune: a sweep and a factorisation, where the method has them."""
    weight = weight_of(layer)
    number, in_features = weight.shape[0] if weight.dim() == 3 else 1, weight.shape[-1]
    if config.statistics is GramMatrix:
        return float(weight.numel() * in_features + number * in_features**3)
    return float(weight.numel())


def _receive(
    done: _Pruned | Exception | None, layer: Layer, owner: int, config: SparsityConfig, processes: Processes
) -> _Pruned:
    """A pruned layer and its row, from the process that pruned it; raises its error in all of them."""

    def header() -> tuple[LayerReport, int]:
        if isinstance(done, tuple):
            return done[1], done[0].num_values
        raise done or RuntimeError("a layer before this one could not be pruned")

    row, num_values = processes.once(header, owner)
    if isinstance(done, tuple):
        sparse = done[0]
    else:
        sparse = empty_like(layer, Pattern(config.pattern), num_values, **config.quantisation)
    for tensor in (sparse.weight.data, sparse.weight_mask, sparse.weight_scale):
        if tensor is not None:
            processes.broadcast(tensor, owner)
    return sparse, row
