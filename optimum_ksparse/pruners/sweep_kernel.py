"""SparseGPT's sweep over one block of columns as one Triton kernel; see `sweep` for the steps.

A thread takes a row of the weight through all columns, a *panel* of them in registers at a time, and shares nothing:
there is no order among rows, and each row's arithmetic is the same wherever it stands.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..kernels.hardware import on_device_of
from ..pattern import Pattern

_PANEL = 16  # columns in registers, or as many whole groups as fit in them
_WARPS = 1  # a program: few rows each, so that a small layer still spreads over the GPU


@triton.jit
def _is_kept(values, FIRST: tl.constexpr, PLACE: tl.constexpr, M: tl.constexpr, ZEROS: tl.constexpr):
    """Whether column PLACE of a group is not among its ZEROS lowest scores, the earlier one first among equals."""
    score = tl.abs(values[FIRST + PLACE])
    rank = tl.zeros_like(score).to(tl.int32)
    for other in tl.static_range(M):
        if other < PLACE:
            rank += (tl.abs(values[FIRST + other]) <= score).to(tl.int32)
        elif other > PLACE:
            rank += (tl.abs(values[FIRST + other]) < score).to(tl.int32)
    return rank >= ZEROS


@triton.jit
def _take_off(values, error, factor_ptr, start, columns, AFTER: tl.constexpr, EVEN: tl.constexpr):
    """What is left of a panel, from column `start`, when the error of one column is taken off all behind AFTER.
    `factor_ptr`: that column's row of the factor."""
    left = ()
    for k in tl.static_range(len(values)):
        if k <= AFTER:
            left += (values[k],)
        else:
            inside = None if EVEN else start + k < columns
            coefficient = tl.load(factor_ptr + start + k, mask=inside, other=None if EVEN else 0)
            left += (tl.fma(-coefficient, error, values[k]),)
    return left


@triton.jit
def _sweep(
    block_ptr,
    factor_ptr,
    mask_ptr,
    errors_ptr,
    columns,
    out,
    stride,  # of the factor's rows
    M: tl.constexpr,
    ZEROS: tl.constexpr,  # of each group of M; 0 where the mask is given, and M is 1
    PANEL: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < out
    for start in range(0, columns, PANEL):
        # Columns behind the last one repeat it, and are not stored.
        values = ()
        for k in tl.static_range(PANEL):
            at = start + k if EVEN else tl.minimum(start + k, columns - 1)
            values += (tl.load(block_ptr + at * out + row, mask=inside, other=0),)
        for earlier in range(start):
            error = tl.load(errors_ptr + earlier * out + row, mask=inside, other=0)
            values = _take_off(values, error, factor_ptr + earlier * stride, start, columns, -1, EVEN)
        errors = ()
        kept = ()
        for first in tl.static_range(0, PANEL, M):
            for i in tl.static_range(M):  # all of a group is chosen before any of it changes
                if ZEROS == 0:
                    at = start + first if EVEN else tl.minimum(start + first, columns - 1)
                    kept += (tl.load(mask_ptr + at * out + row, mask=inside, other=0) != 0,)
                else:
                    kept += (_is_kept(values, first, i, M, ZEROS),)
            for i2 in tl.static_range(M):
                errors += (tl.where(kept[first + i2], 0.0, values[first + i2]),)
                factor_row = factor_ptr + (start + first + i2) * stride
                values = _take_off(values, errors[first + i2], factor_row, start, columns, first + i2, EVEN)
        for k2 in tl.static_range(PANEL):
            at = (start + k2) * out + row
            stored = inside if EVEN else row < tl.where(start + k2 < columns, out, 0)
            tl.store(block_ptr + at, values[k2], mask=stored)
            tl.store(errors_ptr + at, errors[k2], mask=stored)
            if ZEROS > 0:
                tl.store(mask_ptr + at, kept[k2].to(tl.uint8), mask=stored)
        tl.debug_barrier()  # the next panels read these errors


def sweep(block: torch.Tensor, factor: torch.Tensor, pattern: Pattern, mask: torch.Tensor) -> torch.Tensor:
    """As `sweep.sweep`, for groups of up to `WIDEST_GROUP` columns."""
    columns, out = block.shape
    errors = torch.empty_like(block)
    m, zeros = (1, 0) if pattern.m is None or pattern.n is None else (pattern.m, pattern.m - pattern.n)
    panel = max(1, _PANEL // m) * m
    with on_device_of(block):
        _sweep[(triton.cdiv(out, 32 * _WARPS),)](
            block,
            factor,
            mask.view(torch.uint8),
            errors,
            columns,
            out,
            factor.stride(0),
            M=m,
            ZEROS=zeros,
            PANEL=panel,
            EVEN=columns % panel == 0,
            ROWS=32 * _WARPS,
            num_warps=_WARPS,
        )
    return errors
