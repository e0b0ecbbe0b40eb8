"""Merging block by block: adapters into the sparse layers of one decoder block after another, on calibration tokens
that run through the model as it is merged and, beside it, as it was."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from ..blocks import BlockReplay, DecoderBlocks
from ..nn import densified
from ..packing import unpack_mask
from ..pruners.solve import solve_on_mask
from ..pruners.statistics import ColumnNorms, CrossMatrix, GramMatrix
from ..pruning import each_block, relative_output_error
from .adapted import AdaptedLayer, adapted_layers, is_sparse, own_adapters
from .report import MergedLayer


@dataclass
class MergeSettings:
    """How to merge: `solve` what the mask discards; then `damping`, `max_steps` and `tolerance` are those of
    `solve_on_mask`."""

    solve: bool = False
    damping: float = 0.0
    max_steps: int = 100
    tolerance: float = 1e-3


@dataclass
class _Inputs:
    """What is known of a layer's inputs: in the merged model, in the unmerged one, and of both together; that is None
    where they are not those of the same tokens."""

    gram: GramMatrix
    unmerged: ColumnNorms
    cross: CrossMatrix | None


@dataclass
class _BlockMerge:
    """The layers of one block while it is merged. Until all of them are done each keeps its packed weight, and a dense
    stand-in computes what the merged layer will."""

    layers: dict[str, AdaptedLayer]
    stand_ins: dict[str, nn.Linear] = field(default_factory=dict)
    values: dict[str, torch.Tensor] = field(default_factory=dict)

    @contextmanager
    def as_merged(self) -> Iterator[None]:
        """Within it the layers that are done compute as merged ones."""
        bases = {name: self.layers[name].base for name in self.stand_ins}
        try:
            for name, stand_in in self.stand_ins.items():
                self.layers[name].layer.base_layer = stand_in
                self.layers[name].layer.merged_adapters[:] = self.layers[name].names
            yield
        finally:
            for name, base in bases.items():
                self.layers[name].layer.base_layer = base
                self.layers[name].layer.merged_adapters.clear()

    def finish(self) -> None:
        """Merges the packed weights for good."""
        for name, adapted in self.layers.items():
            adapted.layer.merge(safe_merge=True, adapter_names=adapted.names)
            if name in self.values:
                adapted.base.replace_values(self.values[name])


@torch.no_grad()
def merge_blocks(
    blocks: DecoderBlocks, names: list[str], replay: BlockReplay | None, settings: MergeSettings
) -> list[MergedLayer]:
    """Merges the adapters `names`, which must be the active ones, into every sparse layer that has them. PEFT's layers
    stay where they are and count as merged, so that their `unmerge` takes everything back.

    Args:
        blocks: of the base model.
        names: of the adapters.
        replay: the calibration activations of the unmerged model at the first block; None: nothing is measured.
        settings: whether and how to solve, which needs `replay`.

    Returns:
        A row for each layer.
    """
    unmerged = None if replay is None else replay.fork()
    last = len(blocks.blocks) - 1

    def step(index: int, block: nn.Module) -> list[MergedLayer]:
        layers = {
            name: AdaptedLayer(blocks.name_in_decoder(index, name), layer, own_adapters(layer, names))
            for name, layer in adapted_layers(block, names).items()
            if is_sparse(layer)
        }
        merge, rows = _BlockMerge(layers), []
        with densified(block):
            for group in _groups(index, block, layers, replay):
                inputs = {}
                if replay is not None and unmerged is not None:
                    inputs = _collect(index, block, merge, group, replay, unmerged)
                for name in group:
                    rows.append(_merge_layer(name, merge, inputs.get(name), settings))
            if replay is not None and unmerged is not None and index < last:
                with merge.as_merged():
                    replay.advance(index, block)
                unmerged.advance(index, block)
        merge.finish()
        return rows

    tokens = 0 if replay is None else replay.tokens.numel()
    return each_block(f"Merging ({'solve' if settings.solve else 'masked'})", blocks, step, tokens=tokens)


def _groups(
    index: int, block: nn.Module, layers: Mapping[str, AdaptedLayer], replay: BlockReplay | None
) -> list[list[str]]:
    """Names of layers in the order in which they are called, those of one input together: a layer is merged when all
    that it reads from is."""
    if replay is None:
        return [list(layers)]
    called = replay.input_groups(index, block, {name: adapted.layer for name, adapted in layers.items()})
    seen = {name for group in called for name in group}
    return [*called, *([name] for name in layers if name not in seen)]


def _collect(
    index: int,
    block: nn.Module,
    merge: _BlockMerge,
    group: list[str],
    replay: BlockReplay,
    unmerged: BlockReplay,
) -> dict[str, _Inputs]:
    """Statistics of the inputs of a group by layer; a layer that no token reached is missing."""
    layers = {name: merge.layers[name].layer for name in group}
    leaders: dict[str, str] = {}
    inputs: dict[str, _Inputs] = {}
    here = replay.inputs(index, block, layers, leaders)
    there = unmerged.inputs(index, block, layers, {})
    for hidden in replay.hidden:
        others = next(there)
        with merge.as_merged():
            batch = next(here)
        for name, x in batch.items():
            if name not in inputs:
                size = (x.shape[-1], hidden.device)
                known = (GramMatrix(*size, replay.tokens.numel()), ColumnNorms(*size, replay.tokens.numel()))
                inputs[name] = _Inputs(*known, CrossMatrix(*size))
            inputs[name].gram.update(x)
            other, cross = others.get(name), inputs[name].cross
            # Tokens routed to an expert in one model may go elsewhere in the other.
            if other is None or other.shape != x.shape or not _is_whole(x, hidden, replay.skip_first):
                inputs[name].cross = None
            elif cross is not None:
                inputs[name].unmerged.update(other)
                cross.update(other, x)
    return {name: inputs[leader] for name, leader in leaders.items() if leader in inputs}


def _is_whole(x: torch.Tensor, hidden: torch.Tensor, skip_first: bool) -> bool:
    """Whether a layer's input [..., in] has a row for each token of a batch [batch, seq_len, hidden]."""
    return x.numel() // x.shape[-1] == hidden.shape[0] * (hidden.shape[1] - skip_first)


def _merge_layer(name: str, merge: _BlockMerge, inputs: _Inputs | None, settings: MergeSettings) -> MergedLayer:
    """Finds the merged weight of a layer, puts its stand-in up where there are inputs, and describes it."""
    adapted, started = merge.layers[name], time.perf_counter()
    base = adapted.base
    mask = unpack_mask(base.weight_mask, base.in_features)
    effective = adapted.layer.effective_weight(adapted.names)
    change = effective - base.to_dense_weight()
    size, lost = torch.linalg.norm(change), torch.linalg.norm(change.masked_fill(mask, 0))
    weight, how = effective * mask, "masked" if lost > 0 else "exact"
    error = None
    if inputs is not None:
        if settings.solve and lost > 0:
            weight, how = _solve(effective, weight, mask, inputs, settings), "solved"
            merge.values[name] = weight[mask].view_as(base.weight).to(base.weight.dtype)
        merge.stand_ins[name] = _stand_in(adapted, weight)
        original = None if inputs.cross is None else inputs.unmerged.sample
        error = relative_output_error(inputs.gram.sample, effective, merge.stand_ins[name].weight, original)
    return MergedLayer(
        name=adapted.path,
        shape=(base.out_features, base.in_features),
        num_values=base.weight.numel(),
        how=how,
        relative_output_error=error,
        discarded=float(lost / size) if size > 0 else 0.0,
        seconds=round(time.perf_counter() - started, 4),
    )


def _solve(
    effective: torch.Tensor, start: torch.Tensor, mask: torch.Tensor, inputs: _Inputs, settings: MergeSettings
) -> torch.Tensor:
    gram = inputs.gram.gram.to(effective.device)
    cross = None if inputs.cross is None else effective @ inputs.cross.matrix.to(effective.device)
    return solve_on_mask(
        effective,
        gram,
        mask,
        start=start,
        cross=cross,
        damping=settings.damping,
        max_steps=settings.max_steps,
        tolerance=settings.tolerance,
    )


def _stand_in(adapted: AdaptedLayer, weight: torch.Tensor) -> nn.Linear:
    """A dense layer with `weight` [out, in], rounded as the packed one will be, and the bias as it will be merged."""
    base = adapted.base
    dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
    bias = adapted.layer._merged_bias(base.bias, adapted.names)
    if bias is not None:
        dense.bias = nn.Parameter(bias.to(base.weight.dtype), requires_grad=False)
    return dense
