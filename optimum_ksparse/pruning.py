"""The block loop, the only one: collect → prune → propagate, one decoder block at a time; a report row a layer."""

from __future__ import annotations

import time
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from .calibration import BlockReplay, DecoderBlocks, ExpertStack
from .calibration.experts import ExpertMatrix, find_stacks, layer_of, observable
from .checkpoint import SparseModule, aligned, replace_module
from .config import SparsityConfig
from .experts import own_statistics, prune_stack, unsupported_stack
from .nn import SparseLinear, dense_weight, densified, is_linear_map
from .pattern import Pattern
from .pruners import METHODS
from .report import LayerReport
from .statistics import ColumnNorms

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Layer = nn.Module | ExpertStack


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
        if not bool(weight.isfinite().all()):
            return "its weight holds NaN or Inf"
        if shared:
            return f"it shares its weight with {shared[0]}"
        return None if _is_plain(linear) else f"{type(linear).__name__} computes something else than x·Wᵀ + b"


def _is_plain(linear: nn.Module) -> bool:
    """True where a subclass's own forward is still x·Wᵀ + b, tried on random inputs."""
    if type(linear).forward in (nn.Linear.forward, Conv1D.forward):
        return True
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


@torch.no_grad()
def prune_blocks(
    blocks: DecoderBlocks,
    targets: list[dict[str, Layer]],
    config: SparsityConfig,
    replay: BlockReplay | None,
    replaced: dict[str, nn.Module | nn.Parameter] | None = None,
) -> list[LayerReport]:
    """Prunes `targets` block by block and puts sparse modules in their places.

    Args:
        blocks: the model's blocks.
        targets: for each block its layers to prune by name, as `find_targets` gives them; emptied on the way.
        config: method, pattern and settings.
        replay: the calibration activations at the first block; None for a method without data.
        replaced: is given the dense module, or parameter, of each pruned layer, by its path in the decoder, as soon
            as it is replaced.

    Returns:
        A row for each layer. Layers are pruned in the model's order, so on an error the blocks before it are sparse.

    Raises:
        ValueError: activations are NaN or Inf, or no token reached a layer; names the layer.
        ArithmeticError: a Gram matrix stays singular; names the layer.
    """
    rows = []
    for index, block in enumerate(
        tqdm(blocks.blocks, desc=f"Pruning ({config.method} {config.pattern})", unit="block")
    ):
        for layers in _rounds(index, block, targets[index], config, replay):
            statistics = _collect(index, block, layers, config, replay)
            reached = {layer_of(name) for name in statistics}
            unreached = [blocks.name_in_decoder(index, name) for name in layers if name not in reached]
            if replay is not None and unreached:
                raise ValueError(
                    f"{unreached[0]}: no calibration token reached it; use more samples, or modules_to_not_convert"
                )
            for name, layer in layers.items():
                path = blocks.name_in_decoder(index, name)
                sparse: SparseModule
                if isinstance(layer, ExpertStack):
                    sparse, row = prune_stack(path, layer, own_statistics(name, layer, statistics), config)
                else:
                    sparse, row = _prune_layer(path, layer, statistics.get(name), config)
                if replaced is not None:
                    replaced[path] = layer.weight if isinstance(layer, ExpertStack) else layer
                replace_module(blocks.decoder, path, sparse)
                rows.append(row)
        if replay is not None and index + 1 < len(blocks.blocks):
            with densified(block):
                replay.advance(index, block)
        targets[index] = {}  # the last hold on the block's dense weights
    return rows


def _rounds(
    index: int, block: nn.Module, layers: dict[str, Layer], config: SparsityConfig, replay: BlockReplay | None
) -> list[dict[str, Layer]]:
    """The layers to prune from one collection of statistics: all of a block, or group by group."""
    if replay is None or not config.true_sequential:
        return [layers]
    rounds: dict[str, int] = {}  # a stack goes with the first of its matrices
    for number, group in enumerate(replay.input_groups(index, block, observable(layers))):
        for name in group:
            rounds.setdefault(layer_of(name), number)
    groups = [[name for name in rounds if rounds[name] == number] for number in dict.fromkeys(rounds.values())]
    groups += [[name] for name in layers if name not in rounds]
    return [{name: layers[name] for name in group} for group in groups]


def _collect(
    index: int, block: nn.Module, layers: dict[str, Layer], config: SparsityConfig, replay: BlockReplay | None
) -> dict[str, ColumnNorms]:
    """Statistics of the inputs of linear maps by name, and of each matrix of a stack by `matrix_name`."""
    kind = METHODS[config.method].statistics
    if replay is None or kind is None:
        return {}

    def make(layer: nn.Module | ExpertMatrix) -> ColumnNorms:
        device = replay.hidden[0].device
        if isinstance(layer, ExpertMatrix):  # it is there: its module is being called
            return kind(layer.stack.weight.shape[-1], device, replay.tokens.numel())
        with aligned(layer):
            return kind(dense_weight(layer).shape[1], device, replay.tokens.numel())

    return replay.collect(index, block, observable(layers), make)


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
        try:
            pruned, mask = method.prune(weight, statistics, pattern, **settings)
        except ArithmeticError as error:
            raise ArithmeticError(f"{path}: {error}") from error
        sparse = SparseLinear.from_dense(linear, mask, pattern, pruned)
        output_error = None if statistics is None else relative_output_error(statistics.sample, weight, pruned)
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
    dense = torch.linalg.norm(x @ weight.float().T)
    difference = torch.linalg.norm(x @ (pruned.float() - weight.float()).T)
    return float(difference / dense) if dense > 0 else None
