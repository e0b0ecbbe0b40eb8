"""Rounding: kept values as integers, each of which times the scale of its row and group of columns is the weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..quantization import LIMITS, to_integers


def quantise(weight: torch.Tensor, values: str, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds to nearest, with the scales of which the largest weight of each group is the greatest integer.

    Args:
        weight: [out, in], zero where nothing is kept.
        values: type of the integers.
        group_size: so many columns share a scale.

    Returns:
        Integers [out, in], int8, and scales [out, ceil(in / group_size)] in the dtype of the weight.
    """
    greatest = LIMITS[values][1]
    padded = F.pad(weight, (0, -weight.shape[1] % group_size)).unflatten(1, (-1, group_size))
    wide = padded.abs().amax(-1).float() / greatest
    scale = wide.to(weight.dtype)
    # Rounded up, the greatest integer times the scale may have no room in the dtype.
    least = torch.finfo(weight.dtype).eps
    scale = torch.where((scale * greatest).isfinite(), scale, (wide * (1 - least)).to(weight.dtype))
    return to_integers(weight, scale, group_size, values), scale
