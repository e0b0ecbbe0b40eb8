"""Merging block by block: adapters into the sparse layers of one decoder block after another, on calibration tokens
that run through the model as it is merged and, beside it, as it was."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..blocks import BlockReplay, DecoderBlocks
from ..nn import SparseLinear, densified
from ..packing import unpack_mask
from ..pruners.solve import solve_on_mask
from ..pruners.statistics import ColumnNorms, CrossMatrix, GramMatrix
from ..pruning import each_block, relative_output_error
from .adapted import adapted_layers, adapters_of, is_sparse
from .report import MergedLayer


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
    stand-in computes what the merged layer will.

    Attributes:
        layers: PEFT's sparse layers by name. adapters: of each those to merge.
        solver: settings of `solve_on_mask`; None: what the mask discards is lost.
    """

    layers: dict[str, Any]
    adapters: dict[str, list[str]]
    solver: Mapping[str, Any] | None
    stand_ins: dict[str, nn.Linear] = field(default_factory=dict)
    solved: dict[str, torch.Tensor] = field(default_factory=dict)

    @contextmanager
    def as_merged(self) -> Iterator[None]:
        """Within it the layers that are done compute as merged ones."""
        bases = {name: self.layers[name].get_base_layer() for name in self.stand_ins}
        try:
            for name, stand_in in self.stand_ins.items():
                self.layers[name].base_layer = stand_in
                self.layers[name].merged_adapters[:] = self.adapters[name]
            yield
        finally:
            for name, base in bases.items():
                self.layers[name].base_layer = base
                self.layers[name].merged_adapters.clear()

    def merge(self, path: str, name: str, inputs: _Inputs | None) -> MergedLayer:
        """Finds the merged weight of a layer, puts its stand-in up where there are inputs, and describes it."""
        started, layer, error = time.perf_counter(), self.layers[name], None
        base: SparseLinear = layer.get_base_layer()
        mask = unpack_mask(base.weight_mask, base.in_features)
        effective = layer.effective_weight(self.adapters[name])
        change = effective - base.to_dense_weight()
        size, lost = torch.linalg.norm(change), torch.linalg.norm(change.masked_fill(mask, 0))
        weight, how = effective * mask, "masked" if lost > 0 else "exact"
        if inputs is not None:
            original = None if inputs.cross is None else inputs.unmerged.sample
            if self.solver is not None and lost > 0:
                cross = None if inputs.cross is None else effective @ inputs.cross.matrix.to(effective.device)
                gram = inputs.gram.gram.to(effective.device)
                weight = solve_on_mask(effective, gram, mask, start=weight, cross=cross, **self.solver)
                how, self.solved[name] = "solved", weight[mask].view_as(base.weight).to(base.weight.dtype)
            self.stand_ins[name] = self._stand_in(name, base, weight)
            error = relative_output_error(inputs.gram.sample, effective, self.stand_ins[name].weight, original)
        return MergedLayer(
            name=path,
            shape=(base.out_features, base.in_features),
            num_values=base.weight.numel(),
            how=how,
            relative_output_error=error,
            discarded=float(lost / size) if size > 0 else 0.0,
            seconds=round(time.perf_counter() - started, 4),
        )

    def _stand_in(self, name: str, base: SparseLinear, weight: torch.Tensor) -> nn.Linear:
        """A dense layer with `weight` [out, in], rounded as the packed one will be, and the bias as it will be."""
        dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
        bias = self.layers[name]._merged_bias(base.bias, self.adapters[name])
        if bias is not None:
            dense.bias = nn.Parameter(bias.to(base.weight.dtype), requires_grad=False)
        return dense

    def finish(self) -> None:
        """Merges the packed weights for good."""
        for name, layer in self.layers.items():
            layer.merge_kept(self.adapters[name])
            if name in self.solved:
                layer.get_base_layer().replace_values(self.solved[name])


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
        merge = _BlockMerge(layers, {name: adapters_of(layer, names) for name, layer in layers.items()}, solver)
        rows = []
        with densified(block):
            # A layer is merged when all that it reads from is.
            groups = [list(layers)] if replay is None else replay.input_groups(index, block, layers)
            reached = {name for group in groups for name in group}
            for group in [*groups, *([name] for name in layers if name not in reached)]:
                inputs = {}
                if replay is not None and unmerged is not None:
                    inputs = _collect(index, block, merge, group, replay, unmerged)
                for name in group:
                    rows.append(merge.merge(blocks.name_in_decoder(index, name), name, inputs.get(name)))
            if replay is not None and unmerged is not None and index < len(blocks.blocks) - 1:
                with merge.as_merged():
                    replay.advance(index, block)
                unmerged.advance(index, block)
        merge.finish()
        return rows

    how = "masked" if solver is None else "solve"
    return each_block(f"Merging ({how})", blocks, step, tokens=0 if replay is None else replay.tokens.numel())


def _collect(
    index: int, block: nn.Module, merge: _BlockMerge, group: list[str], replay: BlockReplay, unmerged: BlockReplay
) -> dict[str, _Inputs]:
    """Statistics of the inputs of a group by layer; a layer that no token reached is missing."""
    layers = {name: merge.layers[name] for name in group}
    leaders: dict[str, str] = {}
    inputs: dict[str, _Inputs] = {}
    here, there = replay.inputs(index, block, layers, leaders), unmerged.inputs(index, block, layers, {})
    for hidden in replay.hidden:
        others = next(there)
        with merge.as_merged():
            batch = next(here)
        rows = hidden.shape[0] * (hidden.shape[1] - replay.skip_first)
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
