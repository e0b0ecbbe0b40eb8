"""Pruning one linear map."""

from __future__ import annotations

import time

import torch
from torch import nn

from ..config import SparsityConfig
from ..nn import SparseExperts, SparseLinear, dense_weight
from ..pattern import Pattern
from ..pruners import collected_notes, prune
from ..pruners.statistics import ColumnNorms
from ..report import LayerReport
from .memory import trim_heap

# From this size on the heap is trimmed after a layer, which takes some milliseconds.
_LARGE = 2**23


def prune_matrix(
    name: str, weight: torch.Tensor, statistics: ColumnNorms | None, config: SparsityConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pruned weight [out, in] and its mask; errors name the matrix.

    Raises:
        ValueError: inputs or weights are NaN or Inf, or the updated weights have no room in their dtype.
        ArithmeticError: the Gram matrix stays singular.
    """
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


def prune_layer(
    path: str, linear: nn.Module, statistics: ColumnNorms | None, config: SparsityConfig
) -> tuple[SparseLinear, LayerReport]:
    """Prunes a linear map; raises as `prune_matrix` does.

    Args:
        path: in the decoder.
        linear: of the dense model; is not changed.
        statistics: of its inputs; None for a method without data.
        config: method, pattern and settings.

    Returns:
        The packed layer, and its row.
    """
    started = time.perf_counter()
    with collected_notes() as notes:
        weight = dense_weight(linear)
        pruned, mask = prune_matrix(path, weight, statistics, config)
        sparse = SparseLinear.from_dense(linear, mask, Pattern(config.pattern), pruned)
        output_error = None if statistics is None else relative_output_error(statistics.sample, weight, pruned)
    if sparse.dense_bytes >= _LARGE:
        del weight, pruned, mask
        trim_heap()
    return sparse, make_row(path, sparse, output_error, started, "; ".join(notes))


def make_row(
    path: str, sparse: SparseLinear | SparseExperts, output_error: float | None, started: float, note: str
) -> LayerReport:
    """The row of a layer, or of a stack, whose matrices are reported as one, below each other."""
    return LayerReport(
        name=path,
        shape=(getattr(sparse, "num_experts", 1) * sparse.out_features, sparse.in_features),
        pattern=str(sparse.pattern),
        num_values=sparse.weight.numel(),
        dense_bytes=sparse.dense_bytes,
        packed_bytes=sparse.packed_bytes,
        relative_output_error=output_error,
        seconds=round(time.perf_counter() - started, 4),
        note=note,
    )


def relative_output_error(
    inputs: torch.Tensor, weight: torch.Tensor, pruned: torch.Tensor, original: torch.Tensor | None = None
) -> float | None:
    """‖X̂Ŵᵀ − XWᵀ‖_F / ‖XWᵀ‖_F for weights W and Ŵ [out, in], computed in float32, in which it may overflow to NaN or
    Inf; None where there are no inputs or the dense output is zero. X̂ is `inputs` [tokens, in], and X is `original` of
    the same tokens, or `inputs` where that is None."""
    x = inputs.to(weight.device, torch.float32)
    dense = (x if original is None else original.to(x)) @ weight.float().T
    difference = torch.linalg.norm(x @ pruned.float().T - dense)
    size = torch.linalg.norm(dense)
    return None if size == 0 else float(difference / size)
