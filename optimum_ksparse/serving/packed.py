"""What a rank computes with: the weights that vLLM has cut and joined dense, packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from ..kernels import PackedWeight
from ..nn import SparseLinear
from ..packing import pack
from ..pattern import Pattern
from ..quantization import GROUP_STEP, ROW, by_column, columns_of_group, pack_integers


class DenseLinear(nn.Module):
    """A dense layer among sparse ones, by vLLM's own method."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.method = UnquantizedLinearMethod()
        self.method.process_weights_after_loading(self)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.method.apply(self, x, bias)


def packed(
    weight: torch.Tensor,
    recorded: str | None,
    scale: torch.Tensor | None = None,
    quantisation: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A weight [out, in] packed by the zeros that it has: in the recorded pattern, or in none where the share of a
    rank cuts its groups. Dense where that gains nothing, as in a tower whose layers have the names of sparse ones.

    Args:
        recorded: the pattern; None of a dense layer.
        scale: [out, in], where the weight is integers. Where the share of a rank cuts groups that have one scale, and
            they are no groups of columns any more, the values are not quantised.
        quantisation: of the checkpoint's values.
    """
    if recorded is None:
        return DenseLinear(weight)
    pattern, mask = _pattern_and_mask(weight, recorded)
    number = int(mask.sum())
    if scale is not None and quantisation:
        group_size = _group_size(scale, quantisation["group_size"])
        if group_size is not None and 0 < number < mask.numel():
            pattern = pattern or Pattern(f"{mask.numel() - number}/{mask.numel()}")
            kept, bits = pack(weight.to(torch.int8), mask, pattern)
            values, scale = pack_integers(kept, quantisation["values"]), scale[:, ::group_size].contiguous()
            matrix = PackedWeight(values, bits, mask.shape[1], str(pattern), None, scale, group_size)
            return SparseLinear.from_packed(_linear(weight), matrix)
        weight = weight * scale
    if number == 0 or number * weight.element_size() + mask.numel() / 8 >= weight.nbytes:
        return DenseLinear(weight)
    return SparseLinear.from_dense(_linear(weight), mask, pattern, weight)


def _linear(weight: torch.Tensor) -> nn.Linear:
    """What has the shape and dtype of a weight, and nothing else of it."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    return linear.requires_grad_(False)


def _pattern_and_mask(weight: torch.Tensor, recorded: str) -> tuple[Pattern | None, torch.Tensor]:
    group, mask = Pattern(recorded), weight != 0
    if not group.is_semi_structured or group.misfit(*weight.shape):
        return None, mask
    kept = group.mask(weight.abs())  # some of them may be zero
    return (None, mask) if bool((mask & ~kept).any()) else (group, kept)


def _group_size(scale: torch.Tensor, group_size: int) -> int | None:
    """How many neighbouring columns share a scale, wherever a rank has cut them; None where not even the fewest do."""
    in_features = scale.shape[1]
    for size in (columns_of_group(ROW, in_features), columns_of_group(group_size, in_features), GROUP_STEP):
        if torch.equal(by_column(scale[:, ::size], size, in_features).expand_as(scale), scale):
            return size
    return None
