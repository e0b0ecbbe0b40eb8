"""Pruning one linear map."""

from __future__ import annotations

import time

import torch
from torch import nn

from ..config import SparsityConfig
from ..nn import SparseLinear, dense_weight
from ..pattern import Pattern
from ..pruners import collected_notes, prune
from ..pruners.statistics import ColumnNorms
from ..report import LayerReport
from .memory import trim_heap

# From this size on the heap is trimmed after a layer, which takes some milliseconds.
_LARGE = 2**23


def overflow_advice(config: SparsityConfig) -> str:
    """What to do where calibration has overflowed."""
    if config.calibration_dtype == "float16":
        return "take calibration_dtype='bfloat16', or leave it out"
    return "load the model in float32 or bfloat16"


def prune_layer(
    path: str, linear: nn.Module, statistics: ColumnNorms | None, config: SparsityConfig
) -> tuple[SparseLinear, LayerReport]:
    """Prunes a linear map.

    Args:
        path: in the decoder.
        linear: of the dense model; is not changed.
        statistics: of its inputs; None for a method without data.
        config: method, pattern and settings.

    Returns:
        The packed layer, and its row.

    Raises:
        ValueError: inputs or weights are NaN or Inf, or the updated weights have no room in their dtype; names the
            layer.
        ArithmeticError: a Gram matrix stays singular; names the layer.
    """
    if statistics is not None and not bool(statistics.squared_norms.isfinite().all()):
        raise ValueError(f"{path}: its inputs hold NaN or Inf; {overflow_advice(config)}")
    pattern = Pattern(config.pattern)
    started = time.perf_counter()
    with collected_notes() as notes:
        weight = dense_weight(linear)
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{path}: its weight holds NaN or Inf; prune a checkpoint whose weights are whole")
        try:
            pruned, mask = prune(config.method, weight, statistics, pattern, **config.pruner_settings)
        except (ArithmeticError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error
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
        note="; ".join(notes),
    )
    return sparse, row


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
