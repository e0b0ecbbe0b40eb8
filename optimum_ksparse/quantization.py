"""Kept values in 8 or 4 bits: integers, each of which times the scale of its row and group of columns is the weight.

| tensor | shape | dtype | meaning |
|---|---|---|---|
| values, int8 | as in `packing` | int8 | integers from -127 to 127 |
| values, int4 | n:m: [out, ceil(in·n/m / 2)]; otherwise: [ceil(nnz / 2)] | uint8 | integers from -8 to 7, two a byte |
| scale | [out, ceil(in / group_size)] | the layer's | of the kept values of a row in `group_size` columns |

Of two integers in a byte, in two's complement, the first one is in the lower half; a half behind the end is zero.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import logging

from .checks import check_integer, check_one_of
from .packing import unpack_mask

logger = logging.get_logger(__name__)

# Least and greatest integer of a type of values.
LIMITS = {"int8": (-127, 127), "int4": (-8, 7)}
BITS = {"int8": 8, "int4": 4}
# dtype of the packed tensor → its type of values.
TYPES = {torch.int8: "int8", torch.uint8: "int4"}
# A group begins where eight bytes of the mask do, which native code reads at a time.
GROUP_STEP = 64
# As a group size: a row has one scale.
ROW = -1
# Where none is asked for. int4 with 128 columns: 0.125 bits a weight less, and 1.7 times the loss of perplexity on
# SmolLM2-135M at 50 %.
GROUP_SIZES = {"int8": ROW, "int4": 64}


def check_group_size(name: str, value: int) -> int:
    """Gives a number of columns, or `ROW`, back. Raises TypeError or ValueError for what is neither."""
    if check_integer(name, value, ROW) != ROW and (value <= 0 or value % GROUP_STEP):
        raise ValueError(
            f"{name}={value} must be a multiple of {GROUP_STEP} columns, or {ROW}, by which a row has one scale"
        )
    return value


def columns_of_group(group_size: int, in_features: int) -> int:
    """How many columns share a scale, a multiple of `GROUP_STEP`: no more than it takes for a row to have one group,
    whatever a file asks for."""
    whole = -(-in_features // GROUP_STEP) * GROUP_STEP
    return whole if group_size == ROW else min(group_size, whole)


def groups_of_row(group_size: int, in_features: int) -> int:
    """How many scales a row has."""
    return -(-in_features // columns_of_group(group_size, in_features))


def empty_quantised(
    values: str, shape: tuple[int, ...], scale_shape: tuple[int, ...], **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised tensors, for a scale of this shape and so many integers: packed integers, and scale. `options`,
    those of `torch.empty`, are the scale's."""
    check_one_of("values", values, tuple(LIMITS))
    last = shape[-1] if values == "int8" else -(-shape[-1] // 2)
    dtype = next(dtype for dtype, name in TYPES.items() if name == values)
    return torch.empty(*shape[:-1], last, **{**options, "dtype": dtype}), torch.empty(scale_shape, **options)


def check_quantised(packed: torch.Tensor, scale: torch.Tensor, name: str) -> None:
    """Checks tensors that were read from files. Raises ValueError, naming the one of layer `name` that cannot be
    right."""
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        raise ValueError(f"{name}.weight_scale holds NaN, infinity or negative scales; the file is damaged")
    greatest = LIMITS[TYPES[packed.dtype]][1]
    if not bool((scale * greatest).isfinite().all()):
        raise ValueError(
            f"{name}.weight_scale holds scales of which {greatest} times have no room in {scale.dtype}: load it "
            "in bfloat16 or float32, or the file is damaged"
        )
    if packed.dtype is torch.int8 and bool((packed < LIMITS["int8"][0]).any()):
        raise ValueError(f"{name}.weight holds -128, integers are from -127 to 127; the file is damaged")


def check_cast(scale: torch.Tensor, dtype: torch.dtype, values: str, name: str) -> None:
    """Warns, naming layer `name`, where scales become others in `dtype` by more than a rounding, or the greatest
    weight has no room there."""
    wide, cast = scale.float(), scale.to(dtype)
    lost = ((cast.float() - wide).abs() > 2**-8 * wide) | ~(cast * LIMITS[values][0]).isfinite()
    if bool(lost.any()):
        logger.warning(
            f"{name}: {int(lost.sum())} of {lost.numel()} scales of its {values} values have no room in {dtype}, "
            f"among them {float(wide[lost][0]):.3g}, so that its weights change: load or cast the model to bfloat16 "
            "or float32, or call dequantize_values() on it before the cast, which rounds each weight by itself"
        )


def pack_integers(integers: torch.Tensor, values: str) -> torch.Tensor:
    """Integers [..., n], int8, as they are stored: int8 as it is, int4 as uint8 [..., ceil(n / 2)]."""
    if values == "int8":
        return integers
    pairs = torch.nn.functional.pad(integers, (0, integers.shape[-1] % 2)).view(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0].bitwise_and(15).bitwise_or(pairs[..., 1].bitwise_left_shift(4))


def unpack_integers(packed: torch.Tensor, count: int) -> torch.Tensor:
    """What `pack_integers` was given: int8 [..., count]."""
    if packed.dtype is torch.int8:
        return packed
    signed = packed.view(torch.int8)
    # An arithmetic shift to the right brings the sign of a half along.
    halves = torch.stack([signed.bitwise_left_shift(4).bitwise_right_shift(4), signed.bitwise_right_shift(4)], -1)
    return halves.flatten(-2)[..., :count]


def kept_integers(packed: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The integers of the weights that `mask` [out, in] keeps, int8: n:m: [out, in·n/m]; otherwise: [nnz], or one zero
    more."""
    # Rows of n:m keep equally many; behind the last value of a flat tensor nothing is read.
    rows_are_alike = packed.dtype is torch.uint8 and packed.dim() == 2
    return unpack_integers(packed, int(mask[:1].sum()) if rows_are_alike else 2 * packed.numel())


def by_column(scale: torch.Tensor, group_size: int, in_features: int) -> torch.Tensor:
    """The scale of each weight: [out, in_features], or [out, 1] where a row has one."""
    if scale.shape[1] == 1:
        return scale
    return scale.repeat_interleave(group_size, dim=1)[:, :in_features]


def dequantize(
    packed: torch.Tensor, bits: torch.Tensor, in_features: int, scale: torch.Tensor, group_size: int
) -> torch.Tensor:
    """The dense weight [out, in_features] in the dtype of `scale`: each integer times its scale, rounded once."""
    mask = unpack_mask(bits, in_features)
    integers = kept_integers(packed, mask).to(scale.dtype)  # exact in every dtype
    weight = torch.zeros(mask.shape, dtype=scale.dtype, device=scale.device).masked_scatter_(mask, integers)
    return weight.mul_(by_column(scale, group_size, in_features))


def to_integers(weight: torch.Tensor, scale: torch.Tensor, group_size: int, values: str) -> torch.Tensor:
    """The integers [out, in], int8, whose products with the scales are nearest to `weight` [out, in]; 0 where a scale
    is 0."""
    wide = by_column(scale.float(), group_size, weight.shape[1])
    return (weight.float() / wide).nan_to_num(0, 0, 0).round().clamp(*LIMITS[values]).to(torch.int8)
