"""SparseGPT's sweep over one block of columns as one Triton kernel; see `sweep` for the steps.

A thread takes a row of the weight through all columns, a *panel* of them in registers at a time, and shares nothing:
there is no order among rows, and each row's arithmetic is the same wherever it stands.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..nn.kernels.hardware import on_device_of
from ..pattern import Pattern

_PANEL = 16  # columns in registers, or as many whole groups as fit in them
_WARPS = 1  # a program: few rows each, so that a small layer still spreads over the GPU


@triton.jit
def _is_pruned(values, FIRST: tl.constexpr, PLACE: tl.constexpr, M: tl.constexpr, ZEROS: tl.constexpr):
    """Whether column PLACE of a group is among its ZEROS lowest scores, the earlier one first among equals."""
    score = tl.abs(values[FIRST + PLACE])
    rank = tl.zeros_like(score).to(tl.int32)
    for other in tl.static_range(M):
        if other < PLACE:
            rank += (tl.abs(values[FIRST + other]) <= score).to(tl.int32)
        elif other > PLACE:
            rank += (tl.abs(values[FIRST + other]) < score).to(tl.int32)
    return rank < ZEROS


@triton.jit
def _take_off(values, error, lower_ptr, start, columns, stride, column, AFTER: tl.constexpr):
    """A panel's columns after its AFTER-th without the error of `column`."""
    updated = ()
    for k in tl.static_range(len(values)):
        if k < AFTER:
            updated += (values[k],)
        else:
            # Columns behind the last one repeat it, and are not stored.
            at = tl.minimum(start + k, columns - 1) * stride + tl.minimum(column, columns - 1)
            updated += (values[k] - tl.load(lower_ptr + at) * error,)
    return updated


@triton.jit
def _sweep(
    block_ptr,
    lower_ptr,
    mask_ptr,
    errors_ptr,
    columns,
    out,
    stride,  # of the rows of `lower`
    M: tl.constexpr,
    ZEROS: tl.constexpr,  # of each group of M; 0 where the mask is given, and M is 1
    PANEL: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < out
    for start in range(0, columns, PANEL):
        values = ()
        for k in tl.static_range(PANEL):
            values += (tl.load(block_ptr + tl.minimum(start + k, columns - 1) * out + row, mask=inside, other=0),)
        for earlier in range(0, start):
            error = tl.load(errors_ptr + earlier * out + row, mask=inside, other=0)
            values = _take_off(values, error, lower_ptr, start, columns, stride, earlier, 0)
        for first in tl.static_range(0, PANEL, M):
            pruned = ()
            for i in tl.static_range(M):
                if ZEROS == 0:
                    at = tl.minimum(start + first + i, columns - 1) * out + row
                    pruned += (tl.load(mask_ptr + at, mask=inside, other=1) == 0,)
                else:
                    pruned += (_is_pruned(values, first, i, M, ZEROS),)
            for i2 in tl.static_range(M):
                column = start + first + i2
                stored = row < tl.where(column < columns, out, 0)
                error = tl.where(pruned[i2], values[first + i2], 0.0)
                tl.store(errors_ptr + column * out + row, error, mask=stored)
                tl.store(block_ptr + column * out + row, values[first + i2], mask=stored)
                if ZEROS > 0:
                    tl.store(mask_ptr + column * out + row, tl.where(pruned[i2], 0, 1).to(tl.uint8), mask=stored)
                values = _take_off(values, error, lower_ptr, start, columns, stride, column, first + i2 + 1)
        tl.debug_barrier()  # a panel's errors are read for the next ones


def sweep(block: torch.Tensor, lower: torch.Tensor, pattern: Pattern, mask: torch.Tensor) -> torch.Tensor:
    """As `sweep.sweep`, for groups of up to `WIDEST_GROUP` columns."""
    columns, out = block.shape
    errors = torch.empty_like(block)
    m, zeros = (1, 0) if pattern.m is None or pattern.n is None else (pattern.m, pattern.m - pattern.n)
    with on_device_of(block):
        _sweep[(triton.cdiv(out, 32 * _WARPS),)](
            block,
            lower,
            mask.view(torch.uint8),
            errors,
            columns,
            out,
            lower.stride(0),
            M=m,
            ZEROS=zeros,
            PANEL=max(1, _PANEL // m) * m,
            ROWS=32 * _WARPS,
            num_warps=_WARPS,
        )
    return errors
