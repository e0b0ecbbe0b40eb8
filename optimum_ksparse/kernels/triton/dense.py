"""Packed weight to dense, and a dense gradient to the shape of the packed values: two copies that go at the speed of
memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..hardware import on_device_of
from .permute import (
    kept_of_4,
    kept_of_8,
    kept_selectors,
    load_nibbles,
    next_of_8,
    place_in_4,
    place_selectors,
    prmt,
    selector_table,
)

_WARPS, _ROWS = 4, 4


@triton.jit
def _copy(
    values_ptr,
    bits_ptr,
    dense_ptr,
    table_ptr,
    rows,
    steps,  # in_features / 16
    groups,  # in_features / m
    M: tl.constexpr,
    GATHERS: tl.constexpr,  # dense to values, otherwise values to dense
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    # Words of one group: 2:4 32 bits packed and 64 dense, 4:8 twice that. Tiles are [lane, group of its 16 columns].
    PARTS: tl.constexpr = 4 if M == 4 else 2
    lane = tl.arange(0, 32 * WARPS)
    place = lane[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    step = tl.program_id(1) * (32 * WARPS)
    inside = step * PARTS + place < groups
    for r in tl.static_range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + r
        if row < rows:
            at = row * (steps * PARTS if ALIGNED else groups) + step * PARTS + place
            if M == 4:
                word, group = load_nibbles(bits_ptr, row, steps, groups, step, lane, place, inside, ALIGNED)
                if GATHERS:
                    dense = tl.load(dense_ptr + at, mask=inside, other=0)
                    first, second = kept_selectors(word)
                    kept = kept_of_4(dense.to(tl.int32), (dense >> 32).to(tl.int32), first, second, group)
                    tl.store(values_ptr + at, kept, mask=inside)
                else:
                    kept = tl.load(values_ptr + at, mask=inside, other=0, eviction_policy="evict_first")
                    at0, at1, at2, at3 = place_selectors(word)
                    low, high = place_in_4(kept, at0, at1, at2, at3, group)
                    tl.store(dense_ptr + at, _join(low, high), mask=inside)
            else:
                byte = tl.load(bits_ptr + at, mask=inside, other=0).to(tl.int32)
                if GATHERS:
                    low = tl.load(dense_ptr + 2 * at, mask=inside, other=0)
                    high = tl.load(dense_ptr + 2 * at + 1, mask=inside, other=0)
                    x01, x23 = low.to(tl.int32), (low >> 32).to(tl.int32)
                    x45, x67 = high.to(tl.int32), (high >> 32).to(tl.int32)
                    front, back = kept_of_8(x01, x23, x45, x67, tl.load(table_ptr + byte))
                    tl.store(values_ptr + at, _join(front, back), mask=inside)
                else:
                    kept = tl.load(values_ptr + at, mask=inside, other=0, eviction_policy="evict_first")
                    front, back = kept.to(tl.int32), (kept >> 32).to(tl.int32)
                    for half in tl.static_range(2):
                        w0, front, back = next_of_8(front, back, byte & (1 << (4 * half)))
                        w1, front, back = next_of_8(front, back, byte & (2 << (4 * half)))
                        w2, front, back = next_of_8(front, back, byte & (4 << (4 * half)))
                        w3, front, back = next_of_8(front, back, byte & (8 << (4 * half)))
                        dense = _join(prmt(w0, w1, 0x5410), prmt(w2, w3, 0x5410))
                        tl.store(dense_ptr + 2 * at + half, dense, mask=inside)


@triton.jit
def _join(low, high):
    """Two 32-bit words as one of 64."""
    return (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


def decompress(values: torch.Tensor, bits: torch.Tensor, in_features: int, m: int) -> torch.Tensor:
    """Packed 2:4 (m = 4) or 4:8 (m = 8) weight of 16-bit values to dense [out, in_features]."""
    dense = values.new_empty(bits.shape[0], in_features)
    _launch(values, bits, dense, m, gathers=False)
    return dense


def gather(dense: torch.Tensor, bits: torch.Tensor, m: int) -> torch.Tensor:
    """The entries of a contiguous 16-bit `dense` [out, in] at a mask of 2:4 (m = 4) or 4:8 (m = 8): [out, in / 2]."""
    values = dense.new_empty(dense.shape[0], dense.shape[1] // 2)
    _launch(values, bits, dense, m, gathers=True)
    return values


def _launch(values: torch.Tensor, bits: torch.Tensor, dense: torch.Tensor, m: int, gathers: bool) -> None:
    rows, in_features = dense.shape
    aligned = in_features % 16 == 0
    with on_device_of(bits):
        _copy[(triton.cdiv(rows, _ROWS), triton.cdiv(in_features, 512 * _WARPS))](
            values.view(torch.int32 if m == 4 else torch.int64),
            bits.view(torch.int16) if m == 4 and aligned else bits,  # as `load_nibbles` reads them
            dense.view(torch.int64),
            selector_table(bits.device) if m == 8 and gathers else None,
            rows,
            in_features // 16,
            in_features // m,
            M=m,
            GATHERS=gathers,
            ROWS=_ROWS,
            WARPS=_WARPS,
            ALIGNED=aligned,
            num_warps=_WARPS,
        )
