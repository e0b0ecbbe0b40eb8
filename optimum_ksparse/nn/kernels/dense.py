"""Packed weight to dense, and a dense gradient to the shape of the packed values: two copies that go at the speed of
memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .permute import (
    kept_of_4,
    kept_of_8,
    kept_selectors,
    next_of_8,
    place_in_4,
    place_selectors,
    prmt,
    selector_table,
)

_WARPS, _ROWS = 4, 4


@triton.jit
def _decompress(
    values_ptr, bits_ptr, dense_ptr, rows, groups, M: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr
):
    """`groups` of m in a row. Values and dense weight as words of one group: 2:4 32 and 64 bits, 4:8 64 and twice 64."""
    PARTS: tl.constexpr = 4 if M == 4 else 2
    first_row = tl.program_id(0) * (WARPS * ROWS) + tl.arange(0, WARPS)
    group = tl.program_id(1) * (32 * PARTS) + tl.arange(0, 32)[:, None, None] * PARTS
    group = group + tl.arange(0, PARTS)[None, None, :] + (first_row * 0)[None, :, None]
    for r in tl.static_range(ROWS):
        row = (first_row + r * WARPS)[None, :, None].to(tl.int64)
        inside = (group < groups) & (row < rows)
        kept = tl.load(values_ptr + row * groups + group, mask=inside, other=0, eviction_policy="evict_first")
        if M == 4:
            byte = tl.load(bits_ptr + row * ((groups + 1) // 2) + group // 2, mask=inside, other=0).to(tl.int32)
            at0, at1, at2, at3 = place_selectors((byte >> (group % 2 * 4)) & 15)
            low, high = place_in_4(kept, at0, at1, at2, at3, 0)
            dense = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
            tl.store(dense_ptr + row * groups + group, dense, mask=inside)
        else:
            byte = tl.load(bits_ptr + row * groups + group, mask=inside, other=0).to(tl.int32)
            front, back = kept.to(tl.int32), (kept >> 32).to(tl.int32)
            for half in tl.static_range(2):
                w0, front, back = next_of_8(front, back, byte & (1 << (4 * half)))
                w1, front, back = next_of_8(front, back, byte & (2 << (4 * half)))
                w2, front, back = next_of_8(front, back, byte & (4 << (4 * half)))
                w3, front, back = next_of_8(front, back, byte & (8 << (4 * half)))
                low, high = prmt(w0, w1, 0x5410), prmt(w2, w3, 0x5410)
                dense = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
                tl.store(dense_ptr + (row * groups + group) * 2 + half, dense, mask=inside)


@triton.jit
def _gather(
    dense_ptr, bits_ptr, values_ptr, table_ptr, rows, groups, M: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr
):
    """The way back, with the same words."""
    PARTS: tl.constexpr = 4 if M == 4 else 2
    first_row = tl.program_id(0) * (WARPS * ROWS) + tl.arange(0, WARPS)
    group = tl.program_id(1) * (32 * PARTS) + tl.arange(0, 32)[:, None, None] * PARTS
    group = group + tl.arange(0, PARTS)[None, None, :] + (first_row * 0)[None, :, None]
    for r in tl.static_range(ROWS):
        row = (first_row + r * WARPS)[None, :, None].to(tl.int64)
        inside = (group < groups) & (row < rows)
        if M == 4:
            dense = tl.load(dense_ptr + row * groups + group, mask=inside, other=0)
            byte = tl.load(bits_ptr + row * ((groups + 1) // 2) + group // 2, mask=inside, other=0).to(tl.int32)
            first, second = kept_selectors((byte >> (group % 2 * 4)) & 15)
            kept = kept_of_4(dense.to(tl.int32), (dense >> 32).to(tl.int32), first, second, 0)
        else:
            low = tl.load(dense_ptr + (row * groups + group) * 2, mask=inside, other=0)
            high = tl.load(dense_ptr + (row * groups + group) * 2 + 1, mask=inside, other=0)
            byte = tl.load(bits_ptr + row * groups + group, mask=inside, other=0).to(tl.int32)
            x01, x23 = low.to(tl.int32), (low >> 32).to(tl.int32)
            x45, x67 = high.to(tl.int32), (high >> 32).to(tl.int32)
            front, back = kept_of_8(x01, x23, x45, x67, tl.load(table_ptr + byte))
            kept = (back.to(tl.int64) << 32) | (front.to(tl.int64) & 0xFFFFFFFF)
        tl.store(values_ptr + row * groups + group, kept, mask=inside)


def _grid(rows: int, in_features: int) -> tuple[int, int]:
    return triton.cdiv(rows, _WARPS * _ROWS), triton.cdiv(in_features, 512)


def decompress(values: torch.Tensor, bits: torch.Tensor, in_features: int, m: int) -> torch.Tensor:
    """Packed 2:4 (m = 4) or 4:8 (m = 8) weight of 16-bit values to dense [out, in_features]."""
    rows = bits.shape[0]
    dense = values.new_empty(rows, in_features)
    words = values.view(torch.int32 if m == 4 else torch.int64)
    meta = {"M": m, "WARPS": _WARPS, "ROWS": _ROWS, "num_warps": _WARPS}
    _decompress[_grid(rows, in_features)](words, bits, dense.view(torch.int64), rows, in_features // m, **meta)
    return dense


def gather(dense: torch.Tensor, bits: torch.Tensor, m: int) -> torch.Tensor:
    """The entries of a contiguous 16-bit `dense` [out, in] at a mask of 2:4 (m = 4) or 4:8 (m = 8): [out, in / 2]."""
    rows, in_features = dense.shape
    values = dense.new_empty(rows, in_features // 2)
    words = values.view(torch.int32 if m == 4 else torch.int64)
    table = selector_table(dense.device) if m == 8 else None
    meta = {"M": m, "WARPS": _WARPS, "ROWS": _ROWS, "num_warps": _WARPS}
    _gather[_grid(rows, in_features)](dense.view(torch.int64), bits, words, table, rows, in_features // m, **meta)
    return values
