"""Kept values in 8 or 4 bits: integers, each of which times the scale of its row and group of columns is the weight.

| tensor | shape | dtype | meaning |
|---|---|---|---|
| values, int8 | as in `packing` | int8 | integers from -127 to 127 |
| values, int4 | n:m: [out, ceil(in·n/m / 2)]; otherwise: [ceil(nnz / 2)] | uint8 | integers from -8 to 7, two a byte |
| scale | [out, ceil(in / group_size)] | the layer's | of the kept values of a row in `group_size` columns |

Of two integers in a byte, in two's complement, the first one is in the lower half; a half behind the end is zero.
"""

from __future__ import annotations

import torch

from .packing import unpack_mask

# Least and greatest integer of a type of values.
LIMITS = {"int8": (-127, 127), "int4": (-8, 7)}
BITS = {"int8": 8, "int4": 4}
# dtype of the packed tensor → its type of values.
TYPES = {torch.int8: "int8", torch.uint8: "int4"}
# A group begins where eight bytes of the mask do, which native code reads at a time.
GROUP_STEP = 64


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
    halves = packed.dtype is torch.uint8
    # Rows of n:m keep equally many; behind the last value of a flat tensor nothing is read.
    per_row = int(mask[:1].sum()) if halves and packed.dim() == 2 else 2 * packed.numel()
    integers = unpack_integers(packed, per_row).to(scale.dtype)  # exact in every dtype
    weight = torch.zeros(mask.shape, dtype=scale.dtype, device=scale.device).masked_scatter_(mask, integers)
    return weight.mul_(by_column(scale, group_size, in_features))
