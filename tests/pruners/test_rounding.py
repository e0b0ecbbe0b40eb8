"""Rounding: never worse than to nearest, exact where the grid is, and whole on what is hard to scale."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_ksparse.pattern import Pattern
from optimum_ksparse.pruners import prune, rounding
from optimum_ksparse.pruners.rounding import quantise
from optimum_ksparse.pruners.statistics import GramMatrix
from optimum_ksparse.quantization import LIMITS, by_column, to_integers

EVERY = pytest.mark.parametrize("values", sorted(LIMITS))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def statistics_of(inputs):
    statistics = GramMatrix(inputs.shape[1])
    statistics.update(inputs)
    return statistics


def problem(rows=24, columns=160, tokens=400, seed=0, dtype=torch.float32):
    """A weight, that weight pruned, its mask, and statistics of inputs that go together."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    statistics = statistics_of(torch.randn(tokens, columns, generator=generator) @ mixing)
    mask = Pattern("2:4").mask(weight.float().abs())
    return weight, weight * mask, mask, statistics


def dense(rounded, group_size):
    return rounded.integers.float() * by_column(rounded.scale.float(), group_size, rounded.integers.shape[1])


def row_errors(found, weight, statistics):
    difference = found.double() - weight.double()
    return (difference @ statistics.gram.double() * difference).sum(1).clamp(min=0)


def to_nearest(pruned, values, group_size):
    padded = torch.nn.functional.pad(pruned, (0, -pruned.shape[1] % group_size)).unflatten(1, (-1, group_size))
    scale = rounding.Grid(*LIMITS[values], pruned.dtype).reaching(padded.float().abs().amax(-1) / LIMITS[values][1])
    integers = to_integers(pruned, scale, group_size, values)
    return integers.float() * by_column(scale.float(), group_size, pruned.shape[1])


def assert_sound(rounded, mask, values, dtype):
    least, greatest = LIMITS[values]
    assert rounded.integers.dtype is torch.int8 and rounded.scale.dtype is dtype
    assert int(rounded.integers.min()) >= least and int(rounded.integers.max()) <= greatest
    assert not rounded.integers[~mask].any()
    assert bool((rounded.scale.isfinite() & (rounded.scale >= 0)).all())


@given(
    st.integers(1, 9), st.integers(1, 200), st.integers(0, 300), st.sampled_from(sorted(LIMITS)),
    st.sampled_from(DTYPES), st.sampled_from([64, 128, 256]), st.floats(0, 1), st.integers(0, 99),
)  # fmt: skip
def test_no_row_is_worse_than_rounded_to_nearest(rows, columns, tokens, values, dtype, group_size, density, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    mask = torch.rand(rows, columns, generator=generator) < density
    inputs = torch.randn(tokens, columns, generator=generator)
    inputs[:, torch.rand(columns, generator=generator) < 0.2] = 0
    statistics = statistics_of(inputs)
    rounded = quantise(weight, weight * mask, mask, statistics, values, group_size)
    assert_sound(rounded, mask, values, dtype)
    reached = row_errors(dense(rounded, group_size), weight, statistics)
    nearest = row_errors(to_nearest(weight * mask, values, group_size), weight, statistics)
    energy = row_errors(torch.zeros_like(weight), weight, statistics)
    # Of few tokens the quadratic form is a small difference of large float32 numbers.
    slack = 1e-5 * energy + 1e-6 * statistics.gram.trace() * weight.float().square().sum(1)
    assert bool((reached <= nearest + slack).all())
    assert rounded.errors.reached <= rounded.errors.nearest
    for found, expected in ((rounded.errors.reached, reached), (rounded.errors.dense, energy)):
        assert abs(found**2 - float(expected.sum())) <= 4e-3 * float(energy.sum()) + float(slack.sum())


def test_what_a_column_loses_the_others_make_good():
    weight, _, mask, statistics = problem()
    pruned, mask = prune("admm", weight, statistics, Pattern("2:4"))
    start = float(row_errors(pruned, weight, statistics).sum())
    rounded = quantise(weight, pruned, mask, statistics, "int4", 64)
    lost, by_nearest = (error**2 - start for error in (rounded.errors.reached, rounded.errors.nearest))
    assert lost < 0.7 * by_nearest


@pytest.mark.parametrize("group_size", [64, 192])
def test_many_rounds_end_where_no_other_integer_and_no_other_scale_is_better(group_size):
    weight, pruned, mask, statistics = problem(rows=6)
    grid = rounding.Grid(*LIMITS["int4"], torch.float32)
    state = rounding._Problem(weight, mask, statistics.gram, grid, group_size)
    state.sweep(pruned, *rounding.inverse_factor(statistics, 0.1))

    def loss(found):
        difference = (found - state.weight).double()
        return (state.gram.double() @ difference * difference).sum(0)

    losses = []
    for _ in range(60):
        state.descend()
        losses.append(loss(state.rounded))
    assert all(bool((after <= before * (1 + 1e-5)).all()) for before, after in itertools.pairwise(losses))
    integers, scale = state.integers.T.clone(), by_column(state.scale.T, group_size, weight.shape[1])
    for step in (-1, 1):
        for column in range(weight.shape[1]):
            moved = integers.clone()
            moved[:, column] = (moved[:, column] + step).clamp(*LIMITS["int4"]) * mask[:, column]
            assert bool((loss((moved * scale).T) >= losses[-1] * (1 - 1e-5)).all())


@EVERY
def test_what_lies_on_the_grid_stays(values):
    generator = torch.Generator().manual_seed(1)
    _, _, mask, statistics = problem()
    integers = torch.randint(LIMITS[values][0], LIMITS[values][1] + 1, mask.shape, generator=generator) * mask
    integers[:, ::64], mask[:, ::64] = LIMITS[values][1], True
    weight = integers * by_column(torch.rand(24, 3, generator=generator) + 0.5, 64, 160)
    for inputs in (statistics, None):
        rounded = quantise(weight, weight, mask, inputs, values, 64)
        torch.testing.assert_close(dense(rounded, 64), weight)


@EVERY
def test_without_data_the_scale_is_searched(values):
    _, pruned, mask, _ = problem()
    rounded = quantise(pruned, pruned, mask, None, values, 64)
    assert rounded.errors is None
    assert_sound(rounded, mask, values, torch.float32)

    def loss(found):
        return (found - pruned).square().sum()

    assert loss(dense(rounded, 64)) < 1.001 * loss(to_nearest(pruned, values, 64))


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_data", [True, False])
def test_rows_and_groups_that_are_hard_to_scale(values, dtype, has_data):
    _, pruned, mask, statistics = problem(dtype=dtype)
    huge = torch.finfo(dtype).max if dtype is torch.float16 else 1e30
    pruned[0], pruned[1, :64] = 0, 0
    mask[2, 5], mask[3], mask[4, 64:128] = True, True, False
    pruned[2, 5], pruned[3], pruned[4, 64:128] = huge, torch.finfo(dtype).tiny, 0
    rounded = quantise(pruned, pruned, mask, statistics if has_data else None, values, 64)
    assert_sound(rounded, mask, values, dtype)
    found = dense(rounded, 64)
    assert not found[0].any() and not found[1, :64].any() and not found[4, 64:128].any()
    assert abs(float(found[2, 5]) / huge - 1) < 0.13 and bool(found.to(dtype).isfinite().all())


@EVERY
@pytest.mark.parametrize("has_data", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3e-6, 1e-5, 1e-4, 1e-3, 1.0])
def test_where_scales_are_coarse_no_weight_loses_more_than_half_of_one(values, has_data, dtype, size):
    """Scales of float16 are multiples of 2^-24: rounded down, the largest weights would lose several of them."""
    signs = torch.where(torch.rand(8, 64, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    weight = (signs * torch.linspace(0.5, 1, 8).unsqueeze(1) * size).to(dtype)
    inputs = statistics_of(torch.eye(64)) if has_data else None
    rounded = quantise(weight, weight, torch.ones_like(weight, dtype=torch.bool), inputs, values, 64)
    exact = weight.float().abs().amax(1, keepdim=True) / LIMITS[values][1]
    limits = torch.finfo(dtype)
    step = torch.maximum(exact * (1 + limits.eps), exact + limits.smallest_normal * limits.eps)
    assert bool(((dense(rounded, 64) - weight.float()).abs() <= step / 2 * 1.0001).all())


@pytest.mark.parametrize(
    "inputs", [torch.zeros(50, 160), torch.ones(50, 160), torch.eye(160)[:3], 1e-18 * torch.eye(160)]
)
def test_inputs_that_say_little(inputs):
    weight, pruned, mask, _ = problem()
    rounded = quantise(weight, pruned, mask, statistics_of(inputs), "int4", 64)
    assert_sound(rounded, mask, "int4", torch.float32)
    assert rounded.errors.reached <= rounded.errors.nearest


def test_nothing_that_is_passed_changes():
    before = problem()
    weight, pruned, mask, statistics = problem()
    quantise(weight, pruned, mask, statistics, "int4", 64)
    assert all(torch.equal(a, b) for a, b in zip((weight, pruned, mask), before, strict=False))
    assert torch.equal(statistics.gram, before[3].gram)
