"""Products with a weight of whole blocks, r outputs x c inputs, from its packed values: row-major values of a strip of
r rows, which keep the same inputs, are a small dense matrix already, and nothing is decompressed."""

from __future__ import annotations

import torch

from ..packing import unpack_mask
from ..pattern import Pattern
from .products import product_dtype

# Lower strips, and more tokens, take longer than decompressing (2 threads of an Intel Xeon with AVX-512, float32, 50 %
# of 640 x 2048 to 4096 x 4096: one token is 2.7 to 20 times as fast, sixteen 1.6 to 7 times). The BSR product of torch
# keeps a copy of its own, and took 2 to 4 times as long as the dense product with one token, 10 to 16 times with 512:
# with one token less than strips, but a layer that keeps a copy had better keep a dense one.
_LEAST_ROWS, STRIP_TOKENS = 32, 16


def why_not_strips(pattern: str, tokens: int, device: torch.device) -> str | None:
    """Why strips cannot, or should not, compute a product; None where they can."""
    block = Pattern(pattern).tile if "x" in pattern else None
    if block is None:
        return f"strips are for blocks, such as 50%/32x32, not for {pattern}"
    if device.type != "cpu":
        return f"strips were measured on CPUs alone, not on {device.type}"
    if block[0] < _LEAST_ROWS or tokens > STRIP_TOKENS:
        return (
            f"strips pay from {_LEAST_ROWS} rows of a block on, and up to {STRIP_TOKENS} tokens, not with {block[0]} "
            f"rows and {tokens} tokens"
        )
    return None


def strips_linear(
    x: torch.Tensor, values: torch.Tensor, bits: torch.Tensor, bias: torch.Tensor | None, rows: int
) -> torch.Tensor:
    """y [tokens, out] of x [tokens, in] and a weight packed as in `packing`, whose blocks have so many rows."""
    kept = unpack_mask(bits[::rows], x.shape[1])  # [strips, in]
    numbers = kept.sum(1).tolist()
    places = kept.nonzero()[:, 1].split(numbers)
    strips = values.split([rows * number for number in numbers])
    dtype, fast = x.dtype, x.dtype if len(x) == 1 else product_dtype(x.dtype, x.device)
    x, y = x.to(fast), x.new_empty(x.shape[0], len(bits), dtype=fast)
    for strip, columns, out in zip(strips, places, y.split(rows, dim=1), strict=True):
        torch.mm(x[:, columns], strip.view(rows, -1).T.to(fast), out=out)
    return (y if bias is None else y.add_(bias)).to(dtype)
