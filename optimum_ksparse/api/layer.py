"""Pruning one layer without a model."""

from __future__ import annotations

from typing import Any

import torch

from ..config import SparsityConfig
from ..pattern import Pattern
from ..pruners import prune


@torch.no_grad()
def prune_weight(
    weight: torch.Tensor, inputs: torch.Tensor | None, *, method: str, pattern: str | float | Pattern, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prunes one layer without a model.

    Args:
        weight: [out, in], any floating dtype.
        inputs: [tokens, in] or [samples, tokens, in]; None for a method without data.
        method, pattern: as in `SparsityConfig`.
        settings: `refine`, and what `method_settings` of `SparsityConfig` has for the method.

    Returns:
        The pruned weight in its dtype and the mask (bool, True = kept), both [out, in].

    Raises:
        ValueError: an unknown method, pattern or setting, shapes that do not fit, NaN or Inf.
        ArithmeticError: the Gram matrix stays singular.
    """
    refine = settings.pop("refine", ())
    config, parsed = SparsityConfig(method, pattern, refine=refine, method_settings=settings), Pattern(pattern)
    for name, tensor in {"weight": weight, "inputs": inputs}.items():
        if not isinstance(tensor, torch.Tensor) and (name == "weight" or tensor is not None):
            raise TypeError(f"{name} must be a tensor, found {type(tensor).__name__}")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be floating point [out, in], found {weight.dtype} {list(weight.shape)}")
    parsed.check_shape(*weight.shape)
    if not bool(weight.isfinite().all()):
        raise ValueError("weight holds NaN or Inf")
    statistics = None
    if config.statistics is not None:
        if inputs is None or inputs.dim() not in (2, 3) or inputs.shape[-1] != weight.shape[1] or not inputs.numel():
            shape, width = None if inputs is None else list(inputs.shape), weight.shape[1]
            raise ValueError(f"inputs must be [tokens, {width}] or [samples, tokens, {width}], found {shape}")
        if not bool(inputs.isfinite().all()):
            raise ValueError("inputs hold NaN or Inf")
        statistics = config.statistics(weight.shape[1], weight.device)
        statistics.update(inputs)
        if not bool(statistics.squared_norms.isfinite().all()):
            raise ValueError("inputs are too large: their squares overflow to Inf in float32")
    return prune(method, weight, statistics, parsed, **config.pruner_settings)
