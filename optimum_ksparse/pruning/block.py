"""Pruning one decoder block, which is resident: its layers, in one pass or in several, and its reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from torch import nn

from ..blocks import Activations, BlockReplay
from ..blocks.experts import ExpertMatrix, layer_of, observable
from ..blocks.in_step import InStep, OutOfStepError
from ..checkpoint import put
from ..kernels import fast_products
from ..nn import SparseLinear, dense_weight, densified
from ..pruners.statistics import ColumnNorms, GramMatrix
from ..report import LayerReport, PrunedBlock
from .group import prune_group
from .job import SIDE_BY_SIDE, Job
from .reconstruction import output_loss, reconstruct_block
from .targets import Layer, weight_of


def prune_one_block(job: Job, index: int, replay: BlockReplay | None, dense: Activations | None) -> PrunedBlock:
    """Prunes the layers of a block, and reconstructs it, to give the outputs `dense`, where the settings say so.
    `replay` is at the block, and is told its outputs where they are there already."""
    if job.config.reconstruct is None or replay is None or dense is None or not replay.times(index):
        return PrunedBlock(_prune_layers(job, index, replay))
    layers = job.targets[index]
    names, later = list(layers), job.config.values is not None and layers == _modules(layers)
    # Values are rounded when they have been tuned (measured on SmolLM2-135M, int4: losses of 0.036 and 0.069 instead
    # of 0.042 and 0.081 with rounding in the loop, which then lowered them by 0.2 % more in twice the time). Those of
    # packed experts, whose inputs cannot be observed, are tuned with rounding in the loop.
    first = replace(job, config=job.config.changed(values=None, group_size=None)) if later else job
    pruned = PrunedBlock(_prune_layers(first, index, replay))
    del layers
    with fast_products(job.blocks.blocks[index], replay.dtype):  # of its gradients too
        pruned.reconstruction = reconstruct_block(first, index, replay, dense)
        if later:
            _quantise(replace(job, replaced=None), index, names, replay, pruned)  # what was replaced is noted
            pruned.reconstruction.loss_after = output_loss(job, index, replay, dense)
    return pruned


def _quantise(job: Job, index: int, names: list[str], replay: BlockReplay, pruned: PrunedBlock) -> None:
    """Quantises the values of a block's sparse layers, so that these give what they give now."""
    block = job.blocks.blocks[index]
    layers: dict[str, Layer] = {name: block.get_submodule(name) for name in names}
    rows = prune_group(job, index, layers, collect_statistics(job, index, layers, GramMatrix, replay))
    found = {row.name: row for row in rows}
    for row in pruned.layers:
        row.packed_bytes = found[row.name].packed_bytes
        row.seconds = round(row.seconds + found[row.name].seconds, 4)


def _prune_layers(job: Job, index: int, replay: BlockReplay | None) -> list[LayerReport]:
    if job.permute is None:
        return _prune_in_order(job, index, replay)
    reordered = job.permute(index, lambda some: collect_statistics(job, index, some, job.config.statistics, replay))
    rows = _prune_in_order(job, index, replay)
    by_path = {job.blocks.name_in_decoder(index, name): writers for name, writers in reordered.items()}
    for row in rows:
        row.reordered_with = by_path.get(row.name)
    return rows


def _prune_in_order(job: Job, index: int, replay: BlockReplay | None) -> list[LayerReport]:
    layers, names = job.targets[index], tuple(job.targets[index])
    if replay is None or job.config.statistics is None or not job.config.true_sequential or not layers:
        return _prune_together(job, index, layers, replay)
    groups = _groups(job, index, replay)
    if job.groups[names] is not None and all(job.processes.gather(_has_room(layers, replay))):
        try:
            return _prune_in_step(job, index, groups, replay)
        except OutOfStepError:
            for name, layer in _modules(layers).items():
                put(job.blocks.decoder, job.blocks.name_in_decoder(index, name), layer)
            job.groups[names] = None
            groups = _groups(job, index, replay)
    rounds: dict[str, int] = {}  # a stack goes with the first of its matrices
    for number, group in enumerate(groups):
        for name in group:
            rounds.setdefault(layer_of(name), number)
    numbers = dict.fromkeys(rounds.values())
    together = [{name: layers[name] for name in rounds if rounds[name] == number} for number in numbers]
    together += [{name: layers[name]} for name in layers if name not in rounds]
    return [row for some in together for row in _prune_together(job, index, some, replay)]


def _groups(job: Job, index: int, replay: BlockReplay) -> list[list[str]]:
    """Names of layers, and of matrices of stacks, that one batch calls, by the tensor that feeds them, in their order.
    `job.groups` keeps those of blocks alike, which hold until one is out of step; None where a batch may pass a layer
    by."""
    layers, names, block = job.targets[index], tuple(job.targets[index]), job.blocks.blocks[index]
    groups = job.groups.get(names)
    if groups is None:
        groups = job.processes.once(lambda: replay.input_groups(index, block, observable(layers)))
        reached = {name for group in groups for name in group}
        job.groups.setdefault(names, groups if reached == layers.keys() else None)
    return groups


def _prune_together(job: Job, index: int, layers: dict[str, Layer], replay: BlockReplay | None) -> list[LayerReport]:
    """Prunes layers with the statistics of one pass through the block as it is."""
    return prune_group(job, index, layers, collect_statistics(job, index, layers, job.config.statistics, replay))


def _prune_in_step(job: Job, index: int, groups: list[list[str]], replay: BlockReplay) -> list[LayerReport]:
    """Prunes the layers, none of them a stack, in one pass through the block, whose outputs `replay` is told where the
    block is finished with it.

    Raises:
        OutOfStepError: in all processes, where a layer was called with inputs that its statistics lack.
    """
    config, processes, layers = job.config, job.processes, _modules(job.targets[index])
    assert config.statistics is not None
    make, rows = partial(_empty, job, config.statistics, replay), []
    with InStep(replay, index, job.blocks.blocks[index], layers, groups) as batches:
        for group in groups:
            some: dict[str, Layer] = {name: layers[name] for name in group}
            statistics = _added_up(job, index, some, processes.each(lambda: batches.collect(make)), make)
            rows += prune_group(job, index, some, statistics)
            batches.is_pruned()
        outputs = processes.each(batches.finish)
    if config.reconstruct is None and config.activations != "dense" and index + 1 < len(job.blocks.blocks):
        replay.tell_outputs(index, outputs)
    return rows


def _modules(layers: Mapping[str, Layer]) -> dict[str, nn.Module]:
    return {name: layer for name, layer in layers.items() if isinstance(layer, nn.Module)}


def _has_room(layers: Mapping[str, Layer], replay: BlockReplay) -> bool:
    """Whether all batches of this process can be inside the block at a time: then its inputs live, what has been added
    to them, and the inputs of its widest layer."""
    hidden, widest = replay.hidden[0], max(weight_of(layer).shape[-1] for layer in layers.values())
    live = len(replay.hidden) * hidden.nbytes * (2 + widest / hidden.shape[-1])
    is_there = not any(weight_of(layer).is_meta for layer in layers.values())
    return is_there and replay.in_line and len(replay.hidden) <= SIDE_BY_SIDE and replay.hidden.has_room(live)


def collect_statistics(
    job: Job, index: int, layers: dict[str, Layer], kind: type[ColumnNorms] | None, replay: BlockReplay | None
) -> dict[str, ColumnNorms]:
    """Statistics of the inputs of linear maps by name, and of each matrix of a stack by `matrix_name`, over the
    samples of all processes, from one pass through the block as it is. Raises ValueError where no token reached a
    layer; names it."""
    if replay is None or kind is None or not layers:
        return {}
    block, make = job.blocks.blocks[index], partial(_empty, job, kind, replay)
    with densified(block, replay.dtype):  # by the kernel that the finished block's outputs come from
        mine = replay.collect(index, block, observable(layers), make)
    return _added_up(job, index, layers, mine, make)


def _empty(job: Job, kind: type[ColumnNorms], replay: BlockReplay, layer: nn.Module | ExpertMatrix) -> ColumnNorms:
    """Statistics of a layer, without inputs so far."""
    if isinstance(layer, SparseLinear):
        columns = layer.in_features
    else:
        columns = (layer.stack.matrices if isinstance(layer, ExpertMatrix) else dense_weight(layer)).shape[-1]
    return kind(columns, replay.hidden.device, replay.num_rows * job.processes.size)


def _added_up(
    job: Job,
    index: int,
    layers: Mapping[str, Layer],
    mine: dict[str, ColumnNorms],
    make: Callable[[nn.Module | ExpertMatrix], ColumnNorms],
) -> dict[str, ColumnNorms]:
    """Statistics over the samples of all processes. Raises ValueError where no token reached a layer; names it."""
    observed = observable(layers)
    statistics = job.processes.add_up(mine, lambda name: make(observed[name]))
    reached = {layer_of(name) for name in statistics}
    for name in dict.fromkeys(map(layer_of, observed)):
        if name not in reached:
            raise ValueError(
                f"{job.blocks.name_in_decoder(index, name)}: no calibration token reached it; use more samples, or "
                "modules_to_not_convert"
            )
    return statistics
