"""Pruning one decoder block, which is resident: its layers, shared out over processes, and its reconstruction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import nn

from ..blocks import Activations, BlockReplay, DecoderBlocks, ExpertStack
from ..blocks.experts import ExpertMatrix, layer_of, observable
from ..checkpoint import SparseModule, empty_like, put, replace_module
from ..config import SparsityConfig
from ..nn import dense_weight
from ..pattern import Pattern
from ..pruners.statistics import ColumnNorms, GramMatrix
from ..report import LayerReport, PrunedBlock
from .distributed import Processes
from .experts import own_statistics, prune_stack
from .layer import prune_layer
from .reconstruction import reconstruct_block
from .targets import Layer, weight_of

_Pruned = tuple[SparseModule, LayerReport]


@dataclass
class Replaced:
    """What pruning has replaced so far, to be put back on an error.

    Attributes:
        layers: the dense module, or parameter, of each pruned layer by its path in the decoder.
        tuned: parameters that stay in the model, each with its value before.
    """

    layers: dict[str, nn.Module | nn.Parameter] = field(default_factory=dict)
    tuned: list[tuple[nn.Parameter, torch.Tensor]] = field(default_factory=list)

    def restore(self, decoder: nn.Module) -> None:
        """Gives the decoder its dense layers and its values back."""
        for path, dense in self.layers.items():
            put(decoder, path, dense)
        for parameter, value in self.tuned:
            parameter.data = value


def prune_one_block(
    blocks: DecoderBlocks,
    index: int,
    targets: dict[str, Layer],
    config: SparsityConfig,
    replay: BlockReplay | None,
    dense: Activations | None,
    replaced: Replaced | None,
    processes: Processes,
    patterns: Mapping[str, str] = MappingProxyType({}),
) -> PrunedBlock:
    """Prunes the layers of a block, which is resident, and reconstructs it where `config` says so. Arguments as in
    `prune_blocks`, of this block; `dense` are the outputs that it is to give."""
    pruned = PrunedBlock(_prune_layers(blocks, index, targets, config, replay, replaced, processes, patterns))
    if config.reconstruct is not None and replay is not None and dense is not None and replay.times(index):
        kept, block = None if replaced is None else replaced.tuned, blocks.blocks[index]
        elsewhere = {id(p) for i, other in enumerate(blocks.blocks) if i != index for p in other.parameters()}
        pruned.reconstruction = reconstruct_block(index, block, replay, dense, config, processes, kept, elsewhere)
    return pruned


def _prune_layers(
    blocks: DecoderBlocks,
    index: int,
    targets: dict[str, Layer],
    config: SparsityConfig,
    replay: BlockReplay | None,
    replaced: Replaced | None,
    processes: Processes,
    patterns: Mapping[str, str],
) -> list[LayerReport]:
    block, rows = blocks.blocks[index], []
    paths = {name: blocks.name_in_decoder(index, name) for name in targets}
    own = {name: config.with_pattern(patterns.get(path, config.pattern)) for name, path in paths.items()}
    for layers in _rounds(index, block, targets, config, replay, processes):
        kind = config.statistics
        statistics = collect_statistics(blocks, index, layers, kind, replay, processes)
        owners = processes.owners([_cost(layer, config) for layer in layers.values()])
        done: dict[str, _Pruned | Exception] = {}
        for (name, layer), owner in zip(layers.items(), owners, strict=True):
            if owner == processes.rank:
                path = blocks.name_in_decoder(index, name)
                try:
                    if isinstance(layer, ExpertStack):
                        done[name] = prune_stack(path, layer, own_statistics(name, layer, statistics), own[name])
                    else:
                        done[name] = prune_layer(path, layer, statistics.get(name), own[name])
                except Exception as error:  # the others wait for this layer: they are told
                    done[name] = error
                    break
        for (name, layer), owner in zip(layers.items(), owners, strict=True):
            path = blocks.name_in_decoder(index, name)
            sparse, row = _receive(done.get(name), layer, owner, own[name], processes)
            if replaced is not None:
                replaced.layers[path] = layer.weight if isinstance(layer, ExpertStack) else layer
            replace_module(blocks.decoder, path, sparse)
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


def _rounds(
    index: int,
    block: nn.Module,
    layers: dict[str, Layer],
    config: SparsityConfig,
    replay: BlockReplay | None,
    processes: Processes,
) -> list[dict[str, Layer]]:
    """The layers to prune from one collection of statistics: all of a block, or group by group."""
    if replay is None or not config.true_sequential or not layers:
        return [layers]
    rounds: dict[str, int] = {}  # a stack goes with the first of its matrices
    groups = processes.once(lambda: replay.input_groups(index, block, observable(layers)))
    for number, group in enumerate(groups):
        for name in group:
            rounds.setdefault(layer_of(name), number)
    groups = [[name for name in rounds if rounds[name] == number] for number in dict.fromkeys(rounds.values())]
    groups += [[name] for name in layers if name not in rounds]
    return [{name: layers[name] for name in group} for group in groups]


def collect_statistics(
    blocks: DecoderBlocks,
    index: int,
    layers: dict[str, Layer],
    kind: type[ColumnNorms] | None,
    replay: BlockReplay | None,
    processes: Processes,
) -> dict[str, ColumnNorms]:
    """Statistics of the inputs of linear maps by name, and of each matrix of a stack by `matrix_name`, over the
    samples of all processes. Raises ValueError where no token reached a layer; names it."""
    if replay is None or kind is None or not layers:
        return {}

    def make(layer: nn.Module | ExpertMatrix) -> ColumnNorms:
        weight = layer.stack.weight if isinstance(layer, ExpertMatrix) else dense_weight(layer)
        return kind(weight.shape[-1], replay.hidden.device, replay.num_rows * processes.size)

    observed = observable(layers)
    mine = replay.collect(index, blocks.blocks[index], observed, make)
    statistics = processes.add_up(mine, lambda name: make(observed[name]))
    reached = {layer_of(name) for name in statistics}
    for name in layers:
        if name not in reached:
            raise ValueError(
                f"{blocks.name_in_decoder(index, name)}: no calibration token reached it; use more samples, or "
                "modules_to_not_convert"
            )
    return statistics
