"""The pass over the dense model that measures how much each layer has to lose, before a weight is touched: a layer's
share depends on all others. It costs one more forward pass of the calibration data, and with `n:m` a trial mask of
each layer for each pattern in question.

With `n:m` the predicted loss of a layer is Σ W_ij²·‖X_j‖² over the weights that Wanda's scores would prune, divided by
‖XWᵀ‖²: the square of its relative output error, were its inputs uncorrelated. Relative, because what a block adds to
its hidden states is scaled by the norm before and after it: an output of small numbers is not one that matters little.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..blocks import BlockReplay, DecoderBlocks, ExpertStack
from ..blocks.experts import observable
from ..config import SparsityConfig
from ..nn import dense_weight
from ..pattern import Pattern
from ..pruners.allocation import LEFT_DENSE, OUTLIER_MULTIPLE, Allocation, LayerMeasure, allocate, same_density
from ..pruners.statistics import ColumnNorms
from .block import collect_statistics
from .job import Job
from .layer import with_shared
from .loop import over_blocks
from .targets import Layer


@torch.no_grad()
def measure_allocation(job: Job, replay: BlockReplay) -> Allocation:
    """Measures the dense model and chooses a pattern for each layer; `replay`, at the first block, is used up. Raises
    ValueError where weights or activations are NaN or Inf; names the layer."""

    def step(index: int, block: nn.Module) -> list[LayerMeasure]:
        measures: list[LayerMeasure] = []
        if layers := job.targets[index]:
            statistics = collect_statistics(job, index, layers, ColumnNorms, replay)
            # One process decides for all: sums over a matrix may be rounded differently in another.
            measures = job.processes.once(lambda: _measure(job.blocks, index, layers, statistics, job.config))
        if index + 1 < len(job.blocks.blocks):
            replay.advance(index, block)
        return measures

    measures = over_blocks("Measuring what layers lose", job, replay, step)
    return allocate(measures, Pattern(job.config.pattern), job.config.method_setting("target_density"))


def leave_dense(
    blocks: DecoderBlocks, targets: list[dict[str, Layer]], allocation: Allocation, reason: str = LEFT_DENSE
) -> dict[str, str]:
    """Takes from `targets` the layers that stay dense. Gives them with the reason, by their paths in the decoder."""
    left = {}
    for index, layers in enumerate(targets):
        for name in list(layers):
            path = blocks.name_in_decoder(index, name)
            if allocation.patterns[path] is None:
                left[path] = reason
                del layers[name]
    return left


def _measure(
    blocks: DecoderBlocks,
    index: int,
    layers: dict[str, Layer],
    statistics: dict[str, ColumnNorms],
    config: SparsityConfig,
) -> list[LayerMeasure]:
    paths = {name: blocks.name_in_decoder(index, name) for name in layers}
    pattern = Pattern(config.pattern)
    share = None if pattern.is_semi_structured else _outliers(layers, statistics, paths)
    measures = []
    for name, layer in layers.items():
        losses = _losses(name, layer, statistics, paths[name], config) if pattern.is_semi_structured else {}
        num_weights = sum(weight.numel() for weight, _ in _matrices(name, layer, statistics))
        measures.append(LayerMeasure(paths[name], index, num_weights, share, losses))
    return measures


def _outliers(layers: dict[str, Layer], statistics: dict[str, ColumnNorms], paths: dict[str, str]) -> float:
    """Share of entries of |W_ij|·‖X_j‖ above `OUTLIER_MULTIPLE` times their mean, over all layers of a block."""

    def scores() -> Iterator[torch.Tensor]:  # twice, because those of a whole block may be larger than the block
        for name, layer in layers.items():
            for weight, inputs in _matrices(name, layer, statistics):
                yield _scores(weight, inputs, paths[name])

    count, total = 0, 0.0
    for values in scores():
        count += values.numel()
        total += float(values.sum(dtype=torch.float64))
    threshold = OUTLIER_MULTIPLE * total / count
    return sum(int((values > threshold).sum()) for values in scores()) / count


def _losses(
    name: str, layer: Layer, statistics: dict[str, ColumnNorms], path: str, config: SparsityConfig
) -> dict[str, float]:
    """Predicted loss of a layer by pattern; the matrices of a stack count as often as tokens reached them."""
    block_size = config.method_setting("block_size")
    lost: dict[str, float] = {}
    energy = 0.0
    for weight, inputs in _matrices(name, layer, statistics):
        scores = _scores(weight, inputs, path)
        for pattern in same_density(Pattern(config.pattern), weight.shape[1], block_size):
            pruned = scores.masked_fill(pattern.mask(scores), 0)
            loss = inputs.num_tokens * float(pruned.square_().sum(dtype=torch.float64))
            lost[str(pattern)] = lost.get(str(pattern), 0.0) + loss
        sample = inputs.sample.to(weight.device, torch.float32)
        outputs = (sample @ weight.float().T).square_().sum(dtype=torch.float64)
        energy += inputs.num_tokens * float(outputs) / max(1, len(sample))
    return {pattern: loss / energy if energy > 0 else 0.0 for pattern, loss in lost.items()}


def _scores(weight: torch.Tensor, statistics: ColumnNorms, path: str) -> torch.Tensor:
    """|W_ij|·‖X_j‖ [out, in] in float32, the norm a root mean square over the tokens."""
    scores = weight.float().abs() * statistics.squared_norms.to(weight.device).sqrt()
    if not bool(scores.isfinite().all()):
        raise ValueError(
            f"{path}: its weight or its inputs hold NaN or Inf; load the model in float32 or bfloat16, or prune a "
            "checkpoint whose weights are whole"
        )
    return scores


def _matrices(
    name: str, layer: Layer, statistics: dict[str, ColumnNorms]
) -> Iterator[tuple[torch.Tensor, ColumnNorms]]:
    """Each matrix [out, in] of a layer with the statistics that it would be pruned with."""
    inputs = [statistics.get(matrix) for matrix in observable({name: layer})]
    if isinstance(layer, ExpertStack):
        yield from zip(layer.matrices.detach(), with_shared(inputs)[0], strict=True)
    else:
        yield dense_weight(layer), statistics[name]
