"""The block loop, the only one: collect → prune → (reconstruct) → propagate, one decoder block at a time, with what
there is to report of each."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import nn

from .calibration import Activations, BlockReplay, DecoderBlocks, ExpertStack
from .calibration.experts import ExpertMatrix, layer_of, observable
from .checkpoint import SparseModule, aligned, empty_like, put, replace_module
from .config import SparsityConfig
from .distributed import Processes
from .experts import own_statistics, prune_stack
from .memory import trim_heap
from .nn import SparseLinear, dense_weight, densified
from .pattern import Pattern
from .progress import block_progress
from .pruners import prune
from .reconstruction import reconstruct_block
from .report import LayerReport, PrunedBlock
from .statistics import ColumnNorms, GramMatrix
from .targets import Layer

# From this size on the heap is trimmed after a layer, which takes some milliseconds.
_LARGE = 2**23
_Pruned = tuple[SparseModule, LayerReport]
_Row = TypeVar("_Row")


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


def needs_original(config: SparsityConfig) -> bool:
    """Whether the activations of the dense model are needed at every block beside those of the pruned one."""
    return config.reconstruct is not None and config.activations in (None, "mixed")


def always_resident(index: int) -> AbstractContextManager[None]:
    """The blocks of a model that is in memory are always there."""
    return nullcontext()


def each_block(
    description: str,
    blocks: DecoderBlocks,
    step: Callable[[int, nn.Module], list[_Row]],
    *,
    resident: Callable[[int], AbstractContextManager[None]] = always_resident,
    start: int = 0,
    tokens: int = 0,
    show: bool = True,
) -> list[_Row]:
    """Calls `step(index, block)` for each block from `start` on, while it is resident, and shows the progress.

    Returns:
        The rows of all steps.
    """
    rows: list[_Row] = []
    total = len(blocks.blocks)
    with block_progress(description, total, start, tokens, show=show) as advance:
        for index in range(start, total):
            with resident(index):
                done = step(index, blocks.blocks[index])
            rows += done
            advance()
    return rows


@torch.no_grad()
def prune_blocks(
    blocks: DecoderBlocks,
    targets: list[dict[str, Layer]],
    config: SparsityConfig,
    replay: BlockReplay | None,
    replaced: Replaced | None = None,
    *,
    original: BlockReplay | None = None,
    resident: Callable[[int], AbstractContextManager[None]] = always_resident,
    finished: Callable[[int, PrunedBlock], None] | None = None,
    start: int = 0,
    processes: Processes | None = None,
    patterns: Mapping[str, str] | None = None,
) -> list[PrunedBlock]:
    """Prunes `targets` block by block and puts sparse modules in their places.

    Args:
        blocks: the model's blocks.
        targets: for each block its layers to prune by name, as `find_targets` gives them; emptied on the way.
        config: method, pattern and settings.
        replay: the calibration activations at block `start`; None for a method without data.
        replaced: is given what was there before, as soon as it is replaced.
        original: the activations of the dense model at block `start`, where `needs_original` says so; None forks them
            from `replay`.
        resident: where the blocks come from: within `resident(index)` that block's weights are there.
        finished: where they go: called, while the block is there, when it is pruned and the activations are at the
            next one.
        start: the first block to prune.
        processes: which share the work; each has its part of the calibration samples. None: this one alone.
        patterns: of layers that have their own, by their paths in the decoder.

    Returns:
        What there is to report of each block. Layers are pruned in the model's order, so on an error the blocks before
        it are sparse.

    Raises:
        ValueError: activations are NaN or Inf, or no token reached a layer; names the layer.
        ArithmeticError: a Gram matrix stays singular; names the layer.
        ConnectionError: another process has stopped.
    """
    processes = Processes() if processes is None else processes
    total = len(blocks.blocks)
    tokens = 0 if replay is None else sum(processes.gather(replay.tokens.numel()))
    if original is None and replay is not None and needs_original(config):
        original = replay.fork("original")

    def step(index: int, block: nn.Module) -> list[PrunedBlock]:
        dense = _dense_outputs(index, block, config, replay, original)
        pruned = prune_one_block(
            blocks, index, targets[index], config, replay, dense, replaced, processes, patterns or {}
        )
        if replay is not None and index + 1 < total:
            _advance(index, block, config, replay, dense)
        if finished is not None:
            finished(index, pruned)
        targets[index] = {}  # the last hold on the block's dense weights
        return [pruned]

    return each_block(
        _title(config),
        blocks,
        step,
        resident=resident,
        start=start,
        tokens=tokens,
        show=processes.is_main,
    )


def _title(config: SparsityConfig) -> str:
    if config.pattern is None:
        return "Writing what is left"
    steps = (config.method, *config.refine, *([config.reconstruct] if config.reconstruct else []))
    return f"Pruning ({' + '.join(steps)} {config.pattern})"


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
    pruned = PrunedBlock(_prune_block(blocks, index, targets, config, replay, replaced, processes, patterns))
    if config.reconstruct is not None and replay is not None and dense is not None:
        kept, block = None if replaced is None else replaced.tuned, blocks.blocks[index]
        elsewhere = {id(p) for i, other in enumerate(blocks.blocks) if i != index for p in other.parameters()}
        pruned.reconstruction = reconstruct_block(index, block, replay, dense, config, processes, kept, elsewhere)
    return pruned


def _dense_outputs(
    index: int, block: nn.Module, config: SparsityConfig, replay: BlockReplay | None, original: BlockReplay | None
) -> Activations | None:
    """What the still dense block gives: from the dense model's inputs, where these are at hand, which then are at the
    next block; otherwise from those of `replay`. None where nothing asks for it."""
    if replay is None or (config.reconstruct is None and config.activations != "dense"):
        return None
    path = replay.fork("dense") if original is None else original
    path.advance(index, block)
    return path.hidden


def _advance(
    index: int, block: nn.Module, config: SparsityConfig, replay: BlockReplay, dense: Activations | None
) -> None:
    """Brings the activations to the next block: those that the pruned block gives, or, with `activations="dense"`,
    those that the dense one gave."""
    if config.activations == "dense" and dense is not None:
        replay.take(index, dense)
        return
    with densified(block, replay.dtype):
        replay.advance(index, block)


def _prune_block(
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
                        done[name] = _prune_layer(path, layer, statistics.get(name), own[name])
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
    if isinstance(layer, ExpertStack):
        number, out_features, in_features = layer.weight.shape
    else:
        with aligned(layer):
            number, (out_features, in_features) = 1, dense_weight(layer).shape
    if config.statistics is GramMatrix:
        return float(number * (out_features * in_features**2 + in_features**3))
    return float(number * out_features * in_features)


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
        with aligned(layer.owner if isinstance(layer, ExpertStack) else layer):
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
    if replay is None or not config.true_sequential:
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
    if replay is None or kind is None:
        return {}

    def make(layer: nn.Module | ExpertMatrix) -> ColumnNorms:
        if isinstance(layer, ExpertMatrix):  # it is there: its module is being called
            in_features = layer.stack.weight.shape[-1]
        else:
            with aligned(layer):
                in_features = dense_weight(layer).shape[1]
        statistics = kind(in_features, replay.hidden.device, replay.tokens.numel() * processes.size)
        if processes.size > 1 and kind is ColumnNorms:
            statistics.parts = []
        return statistics

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


def _prune_layer(
    path: str, linear: nn.Module, statistics: ColumnNorms | None, config: SparsityConfig
) -> tuple[SparseLinear, LayerReport]:
    if statistics is not None and not bool(statistics.squared_norms.isfinite().all()):
        raise ValueError(f"{path}: its inputs hold NaN or Inf; load the model in float32 or bfloat16")
    pattern = Pattern(config.pattern)
    started = time.perf_counter()
    with aligned(linear), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weight = dense_weight(linear)
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{path}: its weight holds NaN or Inf; prune a checkpoint whose weights are whole")
        try:
            pruned, mask = prune(config.method, weight, statistics, pattern, **config.pruner_settings)
        except ArithmeticError as error:
            raise ArithmeticError(f"{path}: {error}") from error
        sparse = SparseLinear.from_dense(linear, mask, pattern, pruned)
        output_error = None if statistics is None else relative_output_error(statistics.sample, weight, pruned)
    if sparse.dense_bytes >= _LARGE:
        del weight, pruned, mask
        trim_heap()
    row = LayerReport(
        name=path,
        shape=(sparse.out_features, sparse.in_features),
        pattern=str(pattern),
        num_values=sparse.weight.numel(),
        dense_bytes=sparse.dense_bytes,
        packed_bytes=sparse.packed_bytes,
        relative_output_error=output_error,
        seconds=round(time.perf_counter() - started, 4),
        note="; ".join(str(warning.message) for warning in caught),
    )
    return sparse, row


def relative_output_error(
    inputs: torch.Tensor, weight: torch.Tensor, pruned: torch.Tensor, original: torch.Tensor | None = None
) -> float | None:
    """‖X̂Ŵᵀ − XWᵀ‖_F / ‖XWᵀ‖_F for weights W and Ŵ [out, in], computed in float32; None where there are no inputs or
    the dense output is zero. X̂ is `inputs` [tokens, in], and X is `original` of the same tokens, or `inputs` where
    that is None."""
    x = inputs.to(weight.device, torch.float32)
    dense = (x if original is None else original.to(x)) @ weight.float().T
    difference = torch.linalg.norm(x @ pruned.float().T - dense)
    size = torch.linalg.norm(dense)
    return float(difference / size) if size > 0 else None
