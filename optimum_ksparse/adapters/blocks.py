"""Merging block by block: adapters into the sparse layers of one decoder block after another, on calibration tokens
that run through the model as it is merged and, beside it, as it was."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..blocks import BlockReplay, DecoderBlocks
from ..nn import SparseLinear, densified
from ..packing import unpack_mask
from ..pruners.solve import solve_on_mask
from ..pruners.statistics import ColumnNorms, CrossMatrix, GramMatrix
from ..pruning import blocks_with_progress, relative_output_error
from .adapted import adapted_layers, adapters_of, is_sparse
from .layers import kept_values
from .report import MergedLayer


@dataclass
class _Inputs:
    """Statistics of a layer's inputs: in the merged model, in the unmerged one, and of both together; that is None
    where they are not those of the same tokens."""

    gram: GramMatrix
    unmerged: ColumnNorms
    cross: CrossMatrix | None


@torch.no_grad()
def merge_blocks(
    blocks: DecoderBlocks, names: list[str], replay: BlockReplay | None, solver: Mapping[str, Any] | None
) -> list[MergedLayer]:
    """Merges the adapters `names`, which must be the active ones, into every sparse layer that has them. PEFT's layers
    stay where they are and count as merged, so that their `unmerge` takes everything back.

    Args:
        blocks: of the base model.
        names: of the adapters.
        replay: the calibration activations of the unmerged model at the first block; None: nothing is measured.
        solver: settings of `solve_on_mask`, for which there must be a `replay`; None: what the mask discards is lost.

    Returns:
        A row for each layer.
    """
    unmerged = None if replay is None else replay.fork()

    def step(index: int, block: nn.Module) -> list[MergedLayer]:
        layers = {name: layer for name, layer in adapted_layers(block, names).items() if is_sparse(layer)}
        if replay is None or unmerged is None:
            return [merge_layer(index, name, layer, None) for name, layer in layers.items()]
        rows, original = [], copy.deepcopy(block)
        with densified(original):
            # A layer is merged when all that it reads from is.
            groups = unmerged.input_groups(index, original, {name: original.get_submodule(name) for name in layers})
            reached = {name for group in groups for name in group}
            for group in [*groups, *([name] for name in layers if name not in reached)]:
                with densified(block):
                    inputs = _collect(index, block, original, group, replay, unmerged)
                rows += [merge_layer(index, name, layers[name], inputs.get(name)) for name in group]
            if index < len(blocks.blocks) - 1:
                unmerged.advance(index, original)
                with densified(block):
                    replay.advance(index, block)
        return rows

    def merge_layer(index: int, name: str, layer: Any, inputs: _Inputs | None) -> MergedLayer:
        return _merge(blocks.name_in_decoder(index, name), layer, adapters_of(layer, names), inputs, solver)

    how = "masked" if solver is None else "solve"
    tokens = 0 if replay is None else replay.tokens.numel()
    numbers = blocks_with_progress(f"Merging ({how})", len(blocks.blocks), tokens=tokens)
    return [row for index in numbers for row in step(index, blocks.blocks[index])]


def _merge(
    path: str, layer: Any, names: list[str], inputs: _Inputs | None, solver: Mapping[str, Any] | None
) -> MergedLayer:
    """Merges adapters into a layer and describes it."""
    started = time.perf_counter()
    base: SparseLinear = layer.get_base_layer()
    mask = unpack_mask(base.weight_mask, base.in_features)
    effective = layer.effective_weight(names)
    change = effective - base.to_dense_weight()
    size, lost = torch.linalg.norm(change), torch.linalg.norm(change.masked_fill(mask, 0))
    how = "masked" if lost > 0 else "exact"
    layer.merge_kept(names)
    weight = effective.masked_fill(~mask, 0)
    if inputs is not None and solver is not None:
        if lost > 0:
            cross = None if inputs.cross is None else effective @ inputs.cross.matrix.to(effective.device)
            gram = inputs.gram.gram.to(effective.device)
            weight, how = solve_on_mask(effective, gram, mask, start=weight, cross=cross, **solver), "solved"
        if lost > 0 or base.values is not None:
            base.replace_values(*kept_values(base, weight, mask, inputs.gram))
    merged, rounds = base.to_dense_weight(), base.values is not None
    return MergedLayer(
        name=path,
        shape=(base.out_features, base.in_features),
        num_values=base.num_values,
        how=how,
        relative_output_error=_output_error(inputs, effective, merged),
        discarded=float(lost / size) if size > 0 else 0.0,
        seconds=round(time.perf_counter() - started, 4),
        unrounded_output_error=_output_error(inputs, effective, weight) if rounds else None,
        rounding=float(torch.linalg.norm(merged - weight) / size) if rounds and size > 0 else None,
    )


def _output_error(inputs: _Inputs | None, effective: torch.Tensor, merged: torch.Tensor) -> float | None:
    """The relative output error of a merged weight; None where nothing was measured."""
    if inputs is None:
        return None
    original = None if inputs.cross is None else inputs.unmerged.sample
    return relative_output_error(inputs.gram.sample, effective, merged, original)


def _collect(
    index: int, block: nn.Module, original: nn.Module, names: list[str], replay: BlockReplay, unmerged: BlockReplay
) -> dict[str, _Inputs]:
    """Statistics of the inputs of a group of layers, by layer, in a block and in the `original` one; a layer that no
    token reached is missing."""
    leaders: dict[str, str] = {}
    inputs: dict[str, _Inputs] = {}

    def batches(replay: BlockReplay, block: nn.Module, leaders: dict[str, str]) -> Iterator[dict[str, torch.Tensor]]:
        return replay.inputs(index, block, {name: block.get_submodule(name) for name in names}, leaders)

    pairs = zip(batches(replay, block, leaders), batches(unmerged, original, {}), strict=True)
    for hidden, (batch, others) in zip(replay.hidden, pairs, strict=True):
        rows = hidden.shape[0] * (hidden.shape[1] - (not replay.first_weight))
        for name, x in batch.items():
            if name not in inputs:
                size, tokens = (x.shape[-1], hidden.device), replay.tokens.numel()
                inputs[name] = _Inputs(GramMatrix(*size, tokens), ColumnNorms(*size, tokens), CrossMatrix(*size))
            inputs[name].gram.update(x)
            other, cross = others.get(name), inputs[name].cross
            # Tokens routed to an expert in one model may go elsewhere in the other.
            if other is None or other.shape != x.shape or x.numel() // x.shape[-1] != rows:
                inputs[name].cross = None
            elif cross is not None:
                inputs[name].unmerged.update(other)
                cross.update(other, x)
    return {name: inputs[leader] for name, leader in leaders.items() if leader in inputs}
