"""The packed form of a sparse weight [out, in].

| tensor | shape | dtype | meaning |
|---|---|---|---|
| values | n:m: [out, in·n/m]; otherwise: [nnz] | the weight's | kept values, row-major |
| bits | [out, ceil(in/8)] | uint8 | bit k of byte b: weight 8b+k is kept (little-endian bits, padding bits zero) |

A kept value may be zero: the mask says what is stored, not the value.
"""

from __future__ import annotations

import torch

from .pattern import Pattern, in_blocks


def pack(weight: torch.Tensor, mask: torch.Tensor, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """Packs `weight` [out, in] under `mask` [out, in] (bool, True = kept).

    Returns:
        `values` and `bits` as in the table above.

    Raises:
        ValueError: the mask's shape is not the weight's, a group of `n:m` does not keep exactly n, or a block is kept
            in part.
    """
    if weight.shape != mask.shape or weight.dim() != 2:
        raise ValueError(f"weight {list(weight.shape)} and mask {list(mask.shape)} must have the same shape [out, in]")
    pattern.check_shape(*weight.shape)
    if pattern.block is not None and not keeps_whole_blocks(mask, pattern.block):
        raise ValueError(f"mask keeps blocks in part, which pattern {pattern} does not")
    if pattern.m is not None and bool((mask.unflatten(-1, (-1, pattern.m)).sum(-1) != pattern.n).any()):
        raise ValueError(
            f"mask does not keep exactly {pattern.n} weights in every {pattern.m}, as pattern {pattern} does"
        )
    values = weight[mask]
    return (values.view(weight.shape[0], -1) if pattern.is_structured else values), pack_mask(mask)


def keeps_whole_blocks(mask: torch.Tensor, block: tuple[int, int]) -> bool:
    """Whether a mask [out, in] keeps or drops each block whole."""
    blocks = in_blocks(mask, block)
    return bool((blocks == blocks[..., :1]).all())


def unpack(values: torch.Tensor, bits: torch.Tensor, in_features: int) -> torch.Tensor:
    """The dense weight [out, in_features] in the dtype of `values`."""
    weight = torch.zeros(bits.shape[0], in_features, dtype=values.dtype, device=values.device)
    return weight.masked_scatter_(unpack_mask(bits, in_features), values)


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """[out, in] bool to [out, ceil(in/8)] uint8."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8))
    powers = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.unflatten(-1, (-1, 8)) * powers).sum(-1, dtype=torch.uint8)


def unpack_mask(bits: torch.Tensor, in_features: int) -> torch.Tensor:
    """[out, ceil(in/8)] uint8 to [out, in_features] bool."""
    powers = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return bits.unsqueeze(-1).bitwise_and(powers).ne(0).flatten(-2)[:, :in_features]


def values_shape(pattern: Pattern, out_features: int, in_features: int, num_values: int) -> tuple[int, ...]:
    """Shape of the values. Raises ValueError where `num_values` cannot be right for this pattern and shape."""
    pattern.check_shape(out_features, in_features)
    if pattern.m is not None and pattern.n is not None:
        shape: tuple[int, ...] = (out_features, in_features // pattern.m * pattern.n)
        if num_values != shape[0] * shape[1]:
            raise ValueError(f"num_values is {num_values}, pattern {pattern} stores {shape[0] * shape[1]} of {shape}")
        return shape
    if not isinstance(num_values, int) or not 0 <= num_values <= out_features * in_features:
        raise ValueError(f"num_values is {num_values!r}, the weight has {out_features * in_features} places")
    return (num_values,)


def check_bits(bits: torch.Tensor, pattern: Pattern, in_features: int, num_values: int, name: str) -> None:
    """Checks a mask that was read from a file: padding bits are zero, and it keeps as many weights as there are
    values, for `n:m` exactly n in every group, and blocks whole.

    Raises:
        ValueError: names the tensor `name` and says what is wrong.
    """
    mask = unpack_mask(bits, 8 * bits.shape[1])
    if bool(mask[:, in_features:].any()):
        raise ValueError(f"{name}: padding bits behind input feature {in_features} are set; the file is damaged")
    found = int(mask.sum())
    if found != num_values:
        raise ValueError(f"{name} keeps {found} weights, but there are {num_values} values; the file is damaged")
    if pattern.block is not None and not keeps_whole_blocks(mask[:, :in_features], pattern.block):
        raise ValueError(f"{name} keeps blocks of pattern {pattern} in part; the file is damaged")
    if pattern.m is not None:
        counts = mask[:, :in_features].unflatten(-1, (-1, pattern.m)).sum(-1)
        if bool((counts != pattern.n).any()):
            raise ValueError(f"{name} does not keep exactly {pattern.n} in every {pattern.m}; the file is damaged")
