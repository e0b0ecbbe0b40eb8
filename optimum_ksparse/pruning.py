"""The block loop, the only one: collect → prune → propagate, one decoder block at a time; a report row a layer."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from .calibration import BlockReplay, DecoderBlocks, ExpertStack
from .calibration.experts import ExpertMatrix, find_stacks, layer_of, observable
from .checkpoint import SparseModule, aligned, empty_like, replace_module
from .config import SparsityConfig
from .distributed import Processes
from .experts import own_statistics, prune_stack, unsupported_stack
from .memory import trim_heap
from .nn import SparseLinear, dense_weight, densified, is_linear_map
from .pattern import Pattern
from .progress import block_progress
from .pruners import METHODS
from .report import LayerReport
from .statistics import ColumnNorms, GramMatrix

# From this size on the heap is trimmed after a layer, which takes some milliseconds.
_LARGE = 2**23
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Layer = nn.Module | ExpertStack
_Pruned = tuple[SparseModule, LayerReport]


def find_targets(blocks: DecoderBlocks, config: SparsityConfig) -> tuple[list[dict[str, Layer]], dict[str, str]]:
    """What to prune: for each block its linear maps and stacks of matrices by name, and the ones left dense (path in
    the decoder → reason).

    Raises:
        ValueError: a linear map or a stack cannot be pruned and `skip_unsupported` is False, a name in
            `modules_to_not_convert` matches nothing, or nothing is left to prune.
    """
    pattern = Pattern(config.pattern)
    targets: list[dict[str, Layer]] = []
    skipped: dict[str, str] = {}
    owners = _owners(blocks)
    for index, block in enumerate(blocks.blocks):
        layers: dict[str, Layer] = {}
        modules = block.named_modules(remove_duplicate=False)  # one module at two places is shared
        candidates: dict[str, Layer] = {name: module for name, module in modules if is_linear_map(module)}
        for name, layer in {**candidates, **find_stacks(block)}.items():
            path = blocks.name_in_decoder(index, name)
            if not should_convert_module(blocks.name_in_model(index, name), config.modules_to_not_convert):
                skipped[path] = "in modules_to_not_convert"
                continue
            reason = _unsupported(layer, pattern, owners, path)
            if reason is None:
                layers[name] = layer
            elif config.skip_unsupported:
                skipped[path] = reason
            else:
                raise ValueError(
                    f"{path} cannot be pruned: {reason}; leave it dense with modules_to_not_convert=[{name!r}], "
                    "or every such layer with skip_unsupported=True"
                )
        targets.append(layers)
    if not any(targets):
        found = f"{len(blocks.blocks)} x {type(blocks.blocks[0]).__name__} in {blocks.list_name}"
        raise ValueError(
            f"there is no linear map to prune in {found}" + (f", {len(skipped)} are left out" if skipped else "")
        )
    _check_names(blocks, config.modules_to_not_convert)
    return targets, skipped


def _owners(blocks: DecoderBlocks) -> dict[int, list[str]]:
    """Paths of the linear maps and stacks that use each weight, by the weight's id. An offloaded weight is another
    object each time it is brought in; accelerate keeps shared ones itself."""
    owners: dict[int, list[str]] = {}
    for index, block in enumerate(blocks.blocks):
        for name, module in block.named_modules(remove_duplicate=False):  # one module at two places is shared
            if is_linear_map(module) and not hasattr(module, "_hf_hook"):
                owners.setdefault(id(module.weight), []).append(blocks.name_in_decoder(index, name))
        for name, stack in find_stacks(block).items():
            if not hasattr(stack.owner, "_hf_hook"):
                owners.setdefault(id(stack.weight), []).append(blocks.name_in_decoder(index, name))
    return owners


def _unsupported(linear: Layer, pattern: Pattern, owners: dict[int, list[str]], path: str) -> str | None:
    """Why a linear map or a stack cannot be pruned; None where it can."""
    if isinstance(linear, SparseLinear):
        return "it is sparse already; model.dequantize() makes it dense"
    shared = [owner for owner in owners.get(id(linear.weight), ()) if owner != path]
    if isinstance(linear, ExpertStack):
        reason = unsupported_stack(linear, pattern, _DTYPES)
        return f"it is the same parameter as {shared[0]}" if reason is None and shared else reason
    with aligned(linear):
        weight = dense_weight(linear)
        if weight.dtype not in _DTYPES:
            return f"its weight is {weight.dtype}; supported: float32, bfloat16, float16"
        if pattern.m is not None and weight.shape[1] % pattern.m:
            return f"it has {weight.shape[1]} input features, which m={pattern.m} of pattern {pattern} does not divide"
        if not weight.is_meta and not bool(weight.isfinite().all()):
            return "its weight holds NaN or Inf"
        if shared:
            return f"it shares its weight with {shared[0]}"
        return None if _is_plain(linear) else f"{type(linear).__name__} computes something else than x·Wᵀ + b"


def _is_plain(linear: nn.Module) -> bool:
    """True where a subclass's own forward is still x·Wᵀ + b, tried on random inputs."""
    if type(linear).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if dense_weight(linear).is_meta:  # still on the disk
        linear = _with_random_weights(linear)
    weight = dense_weight(linear)
    x = torch.rand(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    with torch.no_grad():
        expected = F.linear(x, weight, linear.bias)  # type: ignore[arg-type]
        try:
            found = linear(x)
        except Exception:  # it takes something else as well
            return False
        if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
            return False
        return bool(torch.allclose(found, expected, rtol=0.05, atol=float(0.05 * expected.abs().max())))


def _with_random_weights(linear: nn.Module) -> nn.Module:
    tried = copy.copy(linear)
    tried.__dict__.pop("forward", None)  # accelerate leaves one that belongs to the module copied from
    tried._parameters = {}
    for name, parameter in linear._parameters.items():
        values = None if parameter is None else nn.Parameter(torch.rand(parameter.shape, dtype=parameter.dtype), False)
        tried._parameters[name] = values
    return tried


def _check_names(blocks: DecoderBlocks, names: list[str] | None) -> None:
    """Raises ValueError for a name that leaves nothing dense: most likely it is misspelt. What is outside the blocks
    (the output head) is dense anyway and may be named."""
    prunable = set()
    for index, block in enumerate(blocks.blocks):
        linears = [name for name, module in block.named_modules() if is_linear_map(module)]
        prunable |= {blocks.name_in_model(index, name) for name in (*linears, *find_stacks(block))}
    inside = blocks.name_in_model(0, "").removesuffix("0.")
    outside = {name for name, _ in blocks.model.named_modules() if not f"{name}.".startswith(inside)}
    for name in names or []:
        if all(should_convert_module(module, [name]) for module in prunable | outside):
            kinds = sorted({module.removeprefix(inside).split(".", 1)[1] for module in prunable})
            raise ValueError(f"modules_to_not_convert: {name!r} matches nothing; the blocks hold {', '.join(kinds)}")


def always_resident(index: int) -> AbstractContextManager[None]:
    """The blocks of a model that is in memory are always there."""
    return nullcontext()


@torch.no_grad()
def prune_blocks(
    blocks: DecoderBlocks,
    targets: list[dict[str, Layer]],
    config: SparsityConfig,
    replay: BlockReplay | None,
    replaced: dict[str, nn.Module | nn.Parameter] | None = None,
    *,
    resident: Callable[[int], AbstractContextManager[None]] = always_resident,
    finished: Callable[[int, list[LayerReport]], None] | None = None,
    start: int = 0,
    processes: Processes | None = None,
) -> list[LayerReport]:
    """Prunes `targets` block by block and puts sparse modules in their places.

    Args:
        blocks: the model's blocks.
        targets: for each block its layers to prune by name, as `find_targets` gives them; emptied on the way.
        config: method, pattern and settings.
        replay: the calibration activations at block `start`; None for a method without data.
        replaced: is given the dense module, or parameter, of each pruned layer, by its path in the decoder, as soon
            as it is replaced.
        resident: where the blocks come from: within `resident(index)` that block's weights are there.
        finished: where they go: called, while the block is there, when it is pruned and `replay` is at the next one.
        start: the first block to prune.
        processes: which share the work; each has its part of the calibration samples. None: this one alone.

    Returns:
        A row for each layer. Layers are pruned in the model's order, so on an error the blocks before it are sparse.

    Raises:
        ValueError: activations are NaN or Inf, or no token reached a layer; names the layer.
        ArithmeticError: a Gram matrix stays singular; names the layer.
        ConnectionError: another process has stopped.
    """
    processes = Processes() if processes is None else processes
    rows: list[LayerReport] = []
    total = len(blocks.blocks)
    tokens = 0 if replay is None else sum(processes.gather(replay.tokens.numel()))
    description = f"Pruning ({config.method} {config.pattern})"
    with block_progress(description, total, start, tokens, show=processes.is_main) as advance:
        for index in range(start, total):
            block = blocks.blocks[index]
            with resident(index):
                pruned = _prune_block(blocks, index, targets[index], config, replay, replaced, processes)
                if replay is not None and index + 1 < total:
                    with densified(block, replay.dtype):
                        replay.advance(index, block)
                if finished is not None:
                    finished(index, pruned)
            targets[index] = {}  # the last hold on the block's dense weights
            rows += pruned
            advance()
    return rows


def _prune_block(
    blocks: DecoderBlocks,
    index: int,
    targets: dict[str, Layer],
    config: SparsityConfig,
    replay: BlockReplay | None,
    replaced: dict[str, nn.Module | nn.Parameter] | None,
    processes: Processes,
) -> list[LayerReport]:
    block, rows = blocks.blocks[index], []
    for layers in _rounds(index, block, targets, config, replay, processes):
        statistics = _collect(index, block, layers, config, replay, processes)
        reached = {layer_of(name) for name in statistics}
        unreached = [blocks.name_in_decoder(index, name) for name in layers if name not in reached]
        if replay is not None and unreached:
            raise ValueError(
                f"{unreached[0]}: no calibration token reached it; use more samples, or modules_to_not_convert"
            )
        owners = processes.owners([_cost(layer, config) for layer in layers.values()])
        done: dict[str, _Pruned | Exception] = {}
        for (name, layer), owner in zip(layers.items(), owners, strict=True):
            if owner == processes.rank:
                path = blocks.name_in_decoder(index, name)
                try:
                    if isinstance(layer, ExpertStack):
                        done[name] = prune_stack(path, layer, own_statistics(name, layer, statistics), config)
                    else:
                        done[name] = _prune_layer(path, layer, statistics.get(name), config)
                except Exception as error:  # the others wait for this layer: they are told
                    done[name] = error
                    break
        for (name, layer), owner in zip(layers.items(), owners, strict=True):
            path = blocks.name_in_decoder(index, name)
            sparse, row = _receive(done.get(name), layer, owner, config, processes)
            if replaced is not None:
                replaced[path] = layer.weight if isinstance(layer, ExpertStack) else layer
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
    if METHODS[config.method].statistics is GramMatrix:
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


def _collect(
    index: int,
    block: nn.Module,
    layers: dict[str, Layer],
    config: SparsityConfig,
    replay: BlockReplay | None,
    processes: Processes,
) -> dict[str, ColumnNorms]:
    """Statistics of the inputs of linear maps by name, and of each matrix of a stack by `matrix_name`."""
    kind = METHODS[config.method].statistics
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
    return processes.add_up(replay.collect(index, block, observed, make), lambda name: make(observed[name]))


def _prune_layer(
    path: str, linear: nn.Module, statistics: ColumnNorms | None, config: SparsityConfig
) -> tuple[SparseLinear, LayerReport]:
    if statistics is not None and not bool(statistics.squared_norms.isfinite().all()):
        raise ValueError(f"{path}: its inputs hold NaN or Inf; load the model in float32 or bfloat16")
    method, pattern = METHODS[config.method], Pattern(config.pattern)
    settings = {name: getattr(config, name) for name in method.settings}
    started = time.perf_counter()
    with aligned(linear), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weight = dense_weight(linear)
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{path}: its weight holds NaN or Inf; prune a checkpoint whose weights are whole")
        try:
            pruned, mask = method.prune(weight, statistics, pattern, **settings)
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


def relative_output_error(inputs: torch.Tensor, weight: torch.Tensor, pruned: torch.Tensor) -> float | None:
    """‖X(Ŵ − W)ᵀ‖_F / ‖XWᵀ‖_F of `inputs` [tokens, in] for weights [out, in], computed in float32; None where there
    are no inputs or the dense output is zero."""
    x = inputs.to(weight.device, torch.float32)
    dense = x @ weight.float().T
    difference = torch.linalg.norm(x @ pruned.float().T - dense)
    size = torch.linalg.norm(dense)
    return float(difference / size) if size > 0 else None
