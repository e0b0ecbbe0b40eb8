"""Pruning one layer: a linear map, or a stack of matrices one by one, each with the statistics of the tokens that were
routed to it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import torch

from ..blocks import ExpertStack
from ..blocks.experts import matrix_name
from ..checkpoint import SparseModule
from ..config import SparsityConfig
from ..kernels import PackedWeight
from ..nn import SparseExperts, SparseLinear
from ..packing import pack, unpack_mask
from ..pattern import Pattern
from ..pruners import collected_notes, prune
from ..pruners.rounding import Rounded, quantise
from ..pruners.statistics import ColumnNorms, GramMatrix
from ..quantization import columns_of_group, pack_integers
from ..report import LayerReport
from .memory import trim_heap
from .targets import Layer, weight_of

# Of a difference, and of what it is a share of.
_Norms = tuple[torch.Tensor, torch.Tensor] | tuple[float, float]
# From this size on the heap is trimmed after a layer, which takes some milliseconds.
_LARGE = 2**23


def prune_layer(
    path: str, layer: Layer, statistics: list[ColumnNorms | None], config: SparsityConfig
) -> tuple[SparseModule, LayerReport]:
    """Prunes a layer of the dense model, which is not changed; or quantises the values of a sparse layer, whose mask
    stays.

    Args:
        path: in the decoder.
        statistics: of the inputs of each of its matrices, one for a linear map; emptied on the way, because a Gram
            matrix and its factor are large. None for a method without data, and for a matrix that no token reached.

    Returns:
        The packed layer, and its row, which reports the matrices of a stack as one, below each other.

    Raises:
        ValueError: inputs or weights are NaN or Inf, or the updated weights have no room in their dtype; names the
            matrix.
        ArithmeticError: a Gram matrix stays singular; names the matrix.
    """
    started, weight = time.perf_counter(), weight_of(layer).detach()
    is_stack = weight.dim() == 3
    masks = _masks(layer)
    statistics = statistics or [None] * len(masks)  # of packed experts there are none
    seen, few = with_shared(statistics) if is_stack else (list(statistics), [])
    notes: dict[str, list[int]] = {}  # what is to be said → numbers of the matrices
    norms: list[_Norms] = []
    nearest: list[_Norms] = []  # by rounding to nearest
    if few and config.statistics is not None:
        least = config.statistics.min_tokens
        notes[f"fewer than {least} calibration tokens each, pruned with the statistics of all experts' tokens"] = few

    def matrices() -> Iterator[PackedWeight]:
        for number, matrix in enumerate(weight if is_stack else weight.unsqueeze(0)):
            with collected_notes() as messages:
                name = matrix_name(path, number) if is_stack else path
                pruned, mask = matrix, masks[number]
                if mask is None:
                    pruned, mask = _prune_matrix(name, matrix, seen[number], config)
                packed, rounded = _pack(name, matrix, pruned, mask, seen[number], config)
            for message in messages:
                notes.setdefault(message, []).append(number)
            if rounded is not None and rounded.errors is not None:
                norms.append((rounded.errors.reached, rounded.errors.dense))
                nearest.append((rounded.errors.nearest, rounded.errors.dense))
            elif (inputs := statistics[number]) is not None:
                norms.append(_output_norms(inputs.sample, matrix, pruned))
            statistics[number] = seen[number] = inputs = None
            yield packed

    sparse: SparseModule
    if isinstance(layer, ExpertStack | SparseExperts):
        transposed = layer.is_transposed if isinstance(layer, ExpertStack) else layer.transposed
        sparse = SparseExperts.from_packed(matrices(), layer.weight.requires_grad, transposed)
        sparse.train((layer.owner if isinstance(layer, ExpertStack) else layer).training)
    else:
        [packed] = matrices()
        sparse = SparseLinear.from_packed(layer, packed)
        del packed
    if sparse.dense_bytes >= _LARGE:
        trim_heap()
    lines = [f"experts {', '.join(map(str, at))}: {note}" if is_stack else note for note, at in notes.items()]
    row = row_of(path, sparse, _ratio(norms), time.perf_counter() - started, "; ".join(lines))
    row.nearest_output_error = _ratio(nearest)
    return sparse, row


def _masks(layer: Layer) -> list[torch.Tensor | None]:
    """The mask [out, in] of each matrix of a sparse layer; None for each that is to be pruned."""
    if isinstance(layer, SparseLinear | SparseExperts):
        mask = unpack_mask(layer.weight_mask, layer.in_features)
        return list(mask if mask.dim() == 3 else mask.unsqueeze(0))
    return [None] * (len(layer.weight) if isinstance(layer, ExpertStack) else 1)


def row_of(
    path: str, sparse: SparseModule, output_error: float | None = None, seconds: float = 0.0, note: str = ""
) -> LayerReport:
    """The row of a packed layer, which reports the matrices of a stack as one, below each other."""
    return LayerReport(
        name=path,
        shape=(getattr(sparse, "num_experts", 1) * sparse.out_features, sparse.in_features),
        pattern=str(sparse.pattern),
        num_values=sparse.num_values,
        dense_bytes=sparse.dense_bytes,
        packed_bytes=sparse.packed_bytes,
        relative_output_error=output_error,
        seconds=round(seconds, 4),
        note=note,
    )


def with_shared(statistics: Sequence[ColumnNorms | None]) -> tuple[list[ColumnNorms | None], list[int]]:
    """Statistics of the matrices of a stack, with those of all its tokens in the places of those with fewer than
    `min_tokens` tokens, and the numbers of these."""
    reached = [one for one in statistics if one is not None]
    few = [i for i, one in enumerate(statistics) if reached and (one is None or one.num_tokens < one.min_tokens)]
    shared = type(reached[0]).merged(reached) if few else None  # a token counts once for each that it reached
    return [shared if i in few else one for i, one in enumerate(statistics)], few


def _prune_matrix(
    name: str, weight: torch.Tensor, statistics: ColumnNorms | None, config: SparsityConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pruned weight [out, in] and its mask; errors name the matrix."""
    if statistics is not None and not bool(statistics.squared_norms.isfinite().all()):
        float16 = config.calibration_dtype == "float16"
        advice = "take calibration_dtype='bfloat16', or leave it out"
        raise ValueError(
            f"{name}: its inputs hold NaN or Inf; {advice if float16 else 'load the model in float32 or bfloat16'}"
        )
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{name}: its weight holds NaN or Inf; prune a checkpoint whose weights are whole")
    try:
        return prune(config.method, weight, statistics, Pattern(config.pattern), **config.pruner_settings)
    except (ArithmeticError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _pack(
    name: str,
    weight: torch.Tensor,
    pruned: torch.Tensor,
    mask: torch.Tensor,
    statistics: ColumnNorms | None,
    config: SparsityConfig,
) -> tuple[PackedWeight, Rounded | None]:
    """A pruned matrix [out, in] under its mask, packed, with its values quantised where the settings say so; errors
    name the matrix."""
    pattern, in_features = Pattern(config.pattern), pruned.shape[1]
    if config.values is None or config.group_size is None:
        return PackedWeight(*pack(pruned, mask, pattern), in_features, str(pattern)), None
    group_size = columns_of_group(config.group_size, in_features)
    inputs = statistics if isinstance(statistics, GramMatrix) else None
    try:
        rounded = quantise(weight, pruned, mask, inputs, config.values, group_size)
    except ArithmeticError as error:
        raise ArithmeticError(f"{name}: {error}") from error
    kept, bits = pack(rounded.integers, mask, pattern)
    values = pack_integers(kept, config.values)
    return PackedWeight(values, bits, in_features, str(pattern), None, rounded.scale, group_size), rounded


def relative_output_error(
    inputs: torch.Tensor, weight: torch.Tensor, pruned: torch.Tensor, original: torch.Tensor | None = None
) -> float | None:
    """‖X̂Ŵᵀ − XWᵀ‖_F / ‖XWᵀ‖_F for weights W and Ŵ [out, in], computed in float32, in which it may overflow to NaN or
    Inf; None where there are no inputs or the dense output is zero. X̂ is `inputs` [tokens, in], and X is `original` of
    the same tokens, or `inputs` where that is None."""
    return _ratio([_output_norms(inputs, weight, pruned, original)])


def _output_norms(
    inputs: torch.Tensor, weight: torch.Tensor, pruned: torch.Tensor, original: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """‖X̂Ŵᵀ − XWᵀ‖_F and ‖XWᵀ‖_F."""
    x = inputs.to(weight.device, torch.float32)
    dense = (x if original is None else original.to(x)) @ weight.float().T
    return torch.linalg.norm(x @ pruned.float().T - dense), torch.linalg.norm(dense)


def _ratio(norms: Sequence[_Norms]) -> float | None:
    """The relative error of several matrices, each with its own inputs."""
    difference, dense = (math.hypot(*(pair[i] for pair in norms)) for i in (0, 1))
    return None if dense == 0 else float(torch.tensor(difference) / torch.tensor(dense))
