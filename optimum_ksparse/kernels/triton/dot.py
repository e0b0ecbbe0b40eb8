"""y = x·Wᵀ + b for some to many tokens: decompresses tiles of W in registers and feeds them to the tensor cores.

The sum over columns may run in any order. So column 8·k + p of W, the p-th weight of mask byte k, is multiplied in the
p-th of eight products, over all k of a tile: each weight of a byte is then found by arithmetic on that byte and its
values alone, in the layout that the tensor cores want, and no tile is ever rearranged.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .permute import (
    INTERPRETED,
    columns_of_scale,
    integer,
    next_of_8,
    pair_of,
    place_in_4,
    place_selectors,
    value_bits,
)


@triton.jit
def _product(w, x, total, DTYPE: tl.constexpr):
    """total + w·x; w [rows, k] int32 with a 16-bit float in its lower half."""
    weight = w.to(tl.int16).to(DTYPE, bitcast=True)
    if INTERPRETED:  # whose bfloat16 products are wrong
        return tl.dot(weight.to(tl.float32), x.to(tl.float32), total)
    else:
        return tl.dot(weight, x, total)


@triton.jit
def _dot(
    x_ptr,
    values_ptr,
    bits_ptr,
    bias_ptr,
    scale_ptr,
    y_ptr,
    partial_ptr,
    rows,
    tokens,
    bytes_in_row,
    x_token,
    x_place,
    x_byte,
    M: tl.constexpr,
    BITS: tl.constexpr,  # of a value: 16, or 8 and 4 of integers
    GROUP: tl.constexpr,  # columns that share a scale; 0: all of a row
    SCALES: tl.constexpr,  # of a row
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BYTES: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    # Programs that run at the same time share eight tiles of rows, so that the cache gives what several of them read.
    row_tiles, token_tiles = tl.cdiv(rows, ROWS), tl.cdiv(tokens, TOKENS)
    pid = tl.program_id(0)
    row_tile, token_tile = tl.swizzle2d(pid // token_tiles, pid % token_tiles, row_tiles, token_tiles, 8)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, BYTES)
    row_start = tl.minimum(row, rows - 1).to(tl.int64)[:, None] * bytes_in_row
    token_start = tl.minimum(token, tokens - 1).to(tl.int64)[None, :] * x_token
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    split = tl.program_id(1)
    for start in range(split * BYTES, bytes_in_row, SPLITS * BYTES):
        inside = None if EVEN else start + k < bytes_in_row
        in_row = None if EVEN else inside[None, :]
        other = None if EVEN else 0
        values = tl.load(values_ptr + row_start + start + k[None, :], mask=in_row, other=other)
        byte = tl.load(bits_ptr + row_start + start + k[None, :], mask=in_row, other=other).to(tl.int32)
        if BITS == 16:
            front, back = values.to(tl.int32), (values >> 32).to(tl.int32)
        else:
            word = values.to(tl.int32)
            w0, w1 = integer(word, 0, BITS), integer(word, 1, BITS)
            w2, w3 = integer(word, 2, BITS), integer(word, 3, BITS)
            if GROUP:
                scale_at = scale_ptr + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * SCALES
                scale = tl.load(scale_at + (start + k)[None, :] * 8 // GROUP, mask=in_row, other=other).to(tl.float32)
                w0, w1, w2, w3 = w0 * scale, w1 * scale, w2 * scale, w3 * scale
            front, back = pair_of(w0, w1, DTYPE), pair_of(w2, w3, DTYPE)
        at = x_ptr + token_start + (start + k)[:, None] * x_byte
        in_column = None if EVEN else inside[:, None]
        if M == 4:
            at0, at1, at2, at3 = place_selectors(byte)
            for group in tl.static_range(2):
                low, high = place_in_4(front if group == 0 else back, at0, at1, at2, at3, group)
                for p in tl.static_range(4):
                    pair = low if p < 2 else high
                    x = tl.load(at + (4 * group + p) * x_place, mask=in_column, other=other)
                    total = _product(pair if p % 2 == 0 else pair >> 16, x, total, DTYPE)
        else:
            for p in tl.static_range(8):
                w, front, back = next_of_8(front, back, byte & (1 << p))
                x = tl.load(at + p * x_place, mask=in_column, other=other)
                total = _product(w, x, total, DTYPE)

    if BITS != 16 and not GROUP:
        total *= tl.load(scale_ptr + row, mask=row < rows, other=0).to(tl.float32)[:, None]
    is_inside = (row < rows)[:, None] & (token < tokens)[None, :]
    out = token.to(tl.int64)[None, :] * rows + row[:, None]
    if SPLITS == 1:
        if HAS_BIAS:
            total += tl.load(bias_ptr + row, mask=row < rows, other=0).to(tl.float32)[:, None]
        tl.store(y_ptr + out, total.to(DTYPE), mask=is_inside)
    else:
        tl.store(partial_ptr + split.to(tl.int64) * rows * tokens + out, total, mask=is_inside)


def dot(
    x: torch.Tensor,
    values: torch.Tensor,
    bits: torch.Tensor,
    bias: torch.Tensor | None,
    m: int,
    *,
    scale: torch.Tensor | None = None,
    group_size: int = 0,
    rows: int,
    tokens: int,
    bytes: int,
    warps: int,
    stages: int,
    splits: int = 1,
    permute: bool = True,
) -> torch.Tensor:
    """y [tokens, out] of x [tokens, in] and a packed weight (table in `packing`), bfloat16 or float16, sums in
    float32.

    Args:
        x: contiguous; 8 must divide in_features.
        m: 4 for 2:4, 8 for 4:8.
        scale, group_size: of values that are integers (table in `quantization`), contiguous. Where a row has several
            scales, weights are rounded to the dtype of x.
        rows, tokens, bytes: of W, of x and of a mask row in a tile.
        warps, stages: a program's warps, and tiles in flight.
        splits: programs that share the sum over columns; their parts are added in a fixed order.
        permute: bring x into the order of the products first, which costs a small kernel and makes its loads wide.
    """
    num_tokens, in_features = x.shape
    out_features = bits.shape[0]
    num_bytes = in_features // 8
    y = x.new_empty(num_tokens, out_features)
    partial = x.new_empty(splits, num_tokens, out_features, dtype=torch.float32) if splits > 1 else None
    if permute:
        x = x.view(num_tokens, num_bytes, 8).transpose(1, 2).contiguous()
    place, byte = (num_bytes, 1) if permute else (1, 8)
    _dot[(triton.cdiv(out_features, rows) * triton.cdiv(num_tokens, tokens), splits)](
        x,
        values.view({16: torch.int64, 8: torch.int32, 4: torch.int16}[value_bits(values)]),
        bits,
        bias,
        scale,
        y,
        partial,
        out_features,
        num_tokens,
        num_bytes,
        in_features,
        place,
        byte,
        M=m,
        BITS=value_bits(values),
        GROUP=columns_of_scale(scale, group_size),
        SCALES=0 if scale is None else scale.shape[1],
        ROWS=rows,
        TOKENS=tokens,
        BYTES=bytes,
        SPLITS=splits,
        EVEN=num_bytes % bytes == 0,
        HAS_BIAS=bias is not None,
        DTYPE=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16,
        num_warps=warps,
        num_stages=stages,
    )
    if partial is None:
        return y
    total = partial.sum(0)
    return torch.add(total, bias).to(x.dtype) if bias is not None else total.to(x.dtype)
