"""y = x·Wᵀ + b for a few tokens: reads packed weights once, at the speed of memory.

A program takes a few rows of W; its warps walk along them side by side, each lane 16 columns at a time: one 128-bit
load of values and 16 bits of mask a row. The kept columns of x are permuted out of registers to meet the values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .permute import (
    columns_of_scale,
    integer,
    kept_of_4,
    kept_of_8,
    kept_selectors,
    load_nibbles,
    selector_table,
    value_bits,
    widen,
)

# Bits of the values of a group → the word that holds them.
_WORDS = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


@triton.jit
def _scale(row_ptr, group, inside, other):
    return tl.load(row_ptr + group, mask=inside, other=other).to(tl.float32)


@triton.jit
def _gemv(
    x_ptr,
    values_ptr,
    bits_ptr,
    bias_ptr,
    scale_ptr,
    table_ptr,
    y_ptr,
    rows,
    tokens,
    steps,  # in_features / 16
    groups,  # in_features / 4
    M: tl.constexpr,
    BITS: tl.constexpr,  # of a value: 16, or 8 and 4 of integers
    GROUP: tl.constexpr,  # columns that share a scale; 0: all of a row
    SCALES: tl.constexpr,  # of a row
    TOKENS: tl.constexpr,
    WARPS: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    # Tiles are [lane, part of a lane's 16 columns]. 2:4: a part is a group, one 32-bit word of values. 4:8: a part is
    # a group of two words. So a lane's values are 128 consecutive bits, and what belongs together is in one lane.
    LANES: tl.constexpr = 32 * WARPS
    PARTS: tl.constexpr = 4 if M == 4 else 2
    lane = tl.arange(0, LANES)
    place = lane[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    first_row = tl.program_id(0) * ROWS
    sums = ()
    for _ in tl.static_range(ROWS * TOKENS):
        sums += (tl.zeros([LANES, PARTS], tl.float32),)

    for step in range(0, steps if ALIGNED else tl.cdiv(groups, 4), LANES):
        inside = None if EVEN else step * PARTS + place < (groups if M == 4 else groups // 2)
        other = None if EVEN else 0
        low = ()
        high = ()
        for t in tl.static_range(TOKENS):
            # Tokens behind the last one repeat it, and are not stored.
            token = x_ptr + tl.minimum(t, tokens - 1).to(tl.int64) * (steps * 4 if ALIGNED else groups) + step * 4
            if M == 4:
                low += (tl.load(token + place, mask=inside, other=other),)
                high += (0,)
            else:
                low += (tl.load(token + 2 * place, mask=inside, other=other),)
                high += (tl.load(token + 2 * place + 1, mask=inside, other=other),)
        updated = ()
        for r in tl.static_range(ROWS):
            row = tl.minimum(first_row + r, rows - 1).to(tl.int64)
            if M == 4:
                at = values_ptr + row * (steps * 4 if ALIGNED else groups) + step * 4 + place
                values = tl.load(at, mask=inside, other=other, eviction_policy="evict_first")
                word, group = load_nibbles(bits_ptr, row, steps, groups, step, lane, place, inside, ALIGNED)
                first, second = kept_selectors(word)
                if BITS == 16:
                    w0, w1 = widen(values, DTYPE)
                else:
                    w0, w1 = integer(values.to(tl.int32), 0, BITS), integer(values.to(tl.int32), 1, BITS)
                if GROUP:
                    scale = _scale(scale_ptr + row * SCALES, (step * PARTS + place) * M // GROUP, inside, other)
                    w0, w1 = w0 * scale, w1 * scale
                for t in tl.static_range(TOKENS):
                    pair = kept_of_4(low[t].to(tl.int32), (low[t] >> 32).to(tl.int32), first, second, group)
                    x0, x1 = widen(pair, DTYPE)
                    updated += (tl.fma(w1, x1, tl.fma(w0, x0, sums[r * TOKENS + t])),)
            else:
                at = row * (steps * 2 if ALIGNED else groups // 2) + step * 2 + place
                values = tl.load(values_ptr + at, mask=inside, other=other, eviction_policy="evict_first")
                byte = tl.load(bits_ptr + at, mask=inside, other=other).to(tl.int32)
                selectors = tl.load(table_ptr + byte, eviction_policy="evict_last")
                if BITS == 16:
                    w0, w1 = widen(values.to(tl.int32), DTYPE)
                    w2, w3 = widen((values >> 32).to(tl.int32), DTYPE)
                else:
                    w0, w1 = integer(values.to(tl.int32), 0, BITS), integer(values.to(tl.int32), 1, BITS)
                    w2, w3 = integer(values.to(tl.int32), 2, BITS), integer(values.to(tl.int32), 3, BITS)
                if GROUP:
                    scale = _scale(scale_ptr + row * SCALES, (step * PARTS + place) * M // GROUP, inside, other)
                    w0, w1, w2, w3 = w0 * scale, w1 * scale, w2 * scale, w3 * scale
                for t in tl.static_range(TOKENS):
                    x01, x23 = low[t].to(tl.int32), (low[t] >> 32).to(tl.int32)
                    x45, x67 = high[t].to(tl.int32), (high[t] >> 32).to(tl.int32)
                    front, back = kept_of_8(x01, x23, x45, x67, selectors)
                    x0, x1 = widen(front, DTYPE)
                    x2, x3 = widen(back, DTYPE)
                    total = tl.fma(w1, x1, tl.fma(w0, x0, sums[r * TOKENS + t]))
                    updated += (tl.fma(w3, x3, tl.fma(w2, x2, total)),)
        sums = updated

    for r2 in tl.static_range(ROWS):
        out = first_row + r2
        for t2 in tl.static_range(TOKENS):
            total = tl.sum(tl.sum(sums[r2 * TOKENS + t2], 1), 0)
            if BITS != 16 and not GROUP:
                total *= tl.load(scale_ptr + tl.minimum(out, rows - 1)).to(tl.float32)
            if HAS_BIAS:
                total += tl.load(bias_ptr + tl.minimum(out, rows - 1)).to(tl.float32)
            at = y_ptr + tl.full([], t2, tl.int64) * rows + out
            tl.store(at, total.to(DTYPE), mask=out < tl.where(t2 < tokens, rows, 0))


def gemv(
    x: torch.Tensor,
    values: torch.Tensor,
    bits: torch.Tensor,
    bias: torch.Tensor | None,
    m: int,
    *,
    scale: torch.Tensor | None = None,
    group_size: int = 0,
    warps: int,
    rows: int,
) -> torch.Tensor:
    """y [tokens, out] of x [tokens, in] and a packed weight (table in `packing`), bfloat16 or float16, sums in
    float32.

    Args:
        x: contiguous, 16-byte aligned, 1 to 4 tokens.
        m: 4 for 2:4 (m must divide in_features), 8 for 4:8.
        scale, group_size: of values that are integers (table in `quantization`), contiguous.
        warps: of a program; the order of the sums depends on it. rows: of W that a program takes.
    """
    tokens, in_features = x.shape
    out_features = bits.shape[0]
    y = x.new_empty(tokens, out_features)
    aligned = in_features % 16 == 0
    bits_of_value = value_bits(values)
    word = _WORDS[bits_of_value * m // 2]
    _gemv[(triton.cdiv(out_features, rows),)](
        x.view(torch.int64),
        values.view(word),
        bits.view(torch.int16) if aligned and m == 4 else bits,
        bias,
        scale,
        selector_table(x.device) if m == 8 else None,
        y,
        out_features,
        tokens,
        in_features // 16,
        in_features // 4,
        M=m,
        BITS=bits_of_value,
        GROUP=columns_of_scale(scale, group_size),
        SCALES=0 if scale is None else scale.shape[1],
        TOKENS=1 if tokens == 1 else 2 if tokens == 2 else 4,
        WARPS=warps,
        ROWS=rows,
        ALIGNED=aligned,
        EVEN=in_features % (512 * warps) == 0,
        HAS_BIAS=bias is not None,
        DTYPE=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16,
        num_warps=warps,
    )
    return y
