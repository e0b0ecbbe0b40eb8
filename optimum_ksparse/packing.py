"""The packed form of a sparse weight [out, in].

| tensor | shape | dtype | meaning |
|---|---|---|---|
| values | n:m: [out, in·n/m]; otherwise: [nnz] | the weight's | kept values, row-major |
| bits | [out, ceil(in/8)] | uint8 | bit k of byte b: weight 8b+k is kept (little-endian bits, padding bits zero) |

A kept value may be zero: the mask says what is stored, not the value.
"""

from __future__ import annotations

import torch

from .pattern import Pattern, in_tiles


def pack(weight: torch.Tensor, mask: torch.Tensor, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """Packs `weight` [out, in] under `mask` [out, in] (bool, True = kept).

    Returns:
        `values` and `bits` as in the table above.

    Raises:
        ValueError: the mask's shape is not the weight's, a group of `n:m` does not keep exactly n, or a tile is kept
            in part.
    """
    if weight.shape != mask.shape or weight.dim() != 2:
        raise ValueError(f"weight {list(weight.shape)} and mask {list(mask.shape)} must have the same shape [out, in]")
    pattern.check_shape(*weight.shape)
    if flaw := _flaw(mask, pattern):
        raise ValueError(f"mask {flaw}")
    values = weight[mask]
    return (values.view(weight.shape[0], -1) if pattern.is_semi_structured else values), pack_mask(mask)


def _flaw(mask: torch.Tensor, pattern: Pattern) -> str | None:
    """What keeps a mask [out, in] from being one of the pattern; None where nothing does."""
    if pattern.tile is not None:
        tiles = in_tiles(mask, pattern.tile)
        if bool((tiles != tiles[..., :1]).any()):
            return f"keeps tiles of pattern {pattern} in part"
    if pattern.m is not None and bool((mask.unflatten(-1, (-1, pattern.m)).sum(-1) != pattern.n).any()):
        return f"does not keep exactly {pattern.n} weights in every {pattern.m}"
    return None


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
    """[..., out, ceil(in/8)] uint8 to [..., out, in_features] bool."""
    powers = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return bits.unsqueeze(-1).bitwise_and(powers).ne(0).flatten(-2)[..., :in_features]


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
    values, for `n:m` exactly n in every group, and tiles whole.

    Raises:
        ValueError: names the tensor `name` and says what is wrong.
    """
    mask = unpack_mask(bits, 8 * bits.shape[1])
    mask, padding = mask[:, :in_features], mask[:, in_features:]
    if bool(padding.any()):
        raise ValueError(f"{name}: padding bits behind input feature {in_features} are set; the file is damaged")
    count = int(mask.sum())
    if count != num_values:
        raise ValueError(f"{name} keeps {count} weights, but there are {num_values} values; the file is damaged")
    if flaw := _flaw(mask, pattern):
        raise ValueError(f"{name} {flaw}; the file is damaged")
