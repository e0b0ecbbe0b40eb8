"""Pruning one decoder block, which is resident: its layers, shared out over processes, and its reconstruction."""

from __future__ import annotations

from torch import nn

from ..blocks import Activations, BlockReplay, ExpertStack
from ..blocks.experts import ExpertMatrix, layer_of, observable
from ..checkpoint import SparseModule, empty_like, replace_module
from ..config import SparsityConfig
from ..kernels import fast_products
from ..nn import dense_weight
from ..pattern import Pattern
from ..pruners.statistics import ColumnNorms, GramMatrix
from ..report import LayerReport, PrunedBlock
from .distributed import Processes
from .experts import own_statistics, prune_stack
from .job import Job
from .layer import prune_layer
from .reconstruction import reconstruct_block
from .targets import Layer, weight_of

_Pruned = tuple[SparseModule, LayerReport]


def prune_one_block(job: Job, index: int, replay: BlockReplay | None, dense: Activations | None) -> PrunedBlock:
    """Prunes the layers of a block, and reconstructs it where the job's settings say so.

    Args:
        replay: the calibration activations at the block; None for a method without data.
        dense: the outputs that it is to give.
    """
    pruned = PrunedBlock(_prune_layers(job, index, replay))
    if job.config.reconstruct is not None and replay is not None and dense is not None and replay.times(index):
        with fast_products(job.blocks.blocks[index], replay.dtype):  # of its gradients too
            pruned.reconstruction = reconstruct_block(job, index, replay, dense)
    return pruned


def _prune_layers(job: Job, index: int, replay: BlockReplay | None) -> list[LayerReport]:
    rows, processes = [], job.processes
    paths = {name: job.blocks.name_in_decoder(index, name) for name in job.targets[index]}
    for layers in _rounds(job, index, replay):
        statistics = collect_statistics(job, index, layers, job.config.statistics, replay)
        owners = dict(
            zip(layers, processes.owners([_cost(layer, job.config) for layer in layers.values()]), strict=True)
        )
        done: dict[str, _Pruned | Exception] = {}
        for name, layer in layers.items():
            if owners[name] != processes.rank:
                continue
            path = paths[name]
            try:
                if isinstance(layer, ExpertStack):
                    own = own_statistics(name, layer, statistics)
                    done[name] = prune_stack(path, layer, own, job.config_of(path))
                else:
                    done[name] = prune_layer(path, layer, statistics.get(name), job.config_of(path))
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
            return done[1], done[0].weight.numel()
        raise done or RuntimeError("a layer before this one could not be pruned")

    row, num_values = processes.once(header, owner)
    if isinstance(done, tuple):
        sparse = done[0]
    else:
        dense = layer.weight if isinstance(layer, ExpertStack) else layer
        sparse = empty_like(dense, Pattern(config.pattern), num_values)
    processes.broadcast(sparse.weight.data, owner)
    processes.broadcast(sparse.weight_mask, owner)
    return sparse, row


def _rounds(job: Job, index: int, replay: BlockReplay | None) -> list[dict[str, Layer]]:
    """The layers to prune from one collection of statistics: all of a block, or group by group."""
    layers = job.targets[index]
    if replay is None or not job.config.true_sequential or not layers:
        return [layers]
    rounds: dict[str, int] = {}  # a stack goes with the first of its matrices
    block = job.blocks.blocks[index]
    groups = job.processes.once(lambda: replay.input_groups(index, block, observable(layers)))
    for number, group in enumerate(groups):
        for name in group:
            rounds.setdefault(layer_of(name), number)
    groups = [[name for name in rounds if rounds[name] == number] for number in dict.fromkeys(rounds.values())]
    groups += [[name] for name in layers if name not in rounds]
    return [{name: layers[name] for name in group} for group in groups]


def collect_statistics(
    job: Job, index: int, layers: dict[str, Layer], kind: type[ColumnNorms] | None, replay: BlockReplay | None
) -> dict[str, ColumnNorms]:
    """Statistics of the inputs of linear maps by name, and of each matrix of a stack by `matrix_name`, over the
    samples of all processes. Raises ValueError where no token reached a layer; names it."""
    if replay is None or kind is None or not layers:
        return {}

    def make(layer: nn.Module | ExpertMatrix) -> ColumnNorms:
        weight = layer.stack.weight if isinstance(layer, ExpertMatrix) else dense_weight(layer)
        return kind(weight.shape[-1], replay.hidden.device, replay.num_rows * job.processes.size)

    observed = observable(layers)
    mine = replay.collect(index, job.blocks.blocks[index], observed, make)
    statistics = job.processes.add_up(mine, lambda name: make(observed[name]))
    reached = {layer_of(name) for name in statistics}
    for name in layers:
        if name not in reached:
            raise ValueError(
                f"{job.blocks.name_in_decoder(index, name)}: no calibration token reached it; use more samples, or "
                "modules_to_not_convert"
            )
    return statistics
