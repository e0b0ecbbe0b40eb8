"""The exact weights on a fixed mask, against least squares in float64, row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_ksparse.pattern import Pattern
from optimum_ksparse.pruners.solve import solve_on_mask


def problem(seed: int, out: int = 6, width: int = 16, tokens: int = 200, condition: float = 10.0):
    """Inputs [tokens, in] float64 with singular values from 1 down to 1/√condition, a weight and a 2:4 mask."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(tokens, width, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -0.5 * torch.log10(torch.tensor(condition)).item(), width, dtype=torch.float64)
    x = left * values @ right * tokens**0.5
    weight = torch.randn(out, width, generator=generator, dtype=torch.float64)
    return x, weight, Pattern("2:4").mask(torch.rand(out, width, generator=generator))


def least_squares(x: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Row by row on its kept columns; target [tokens, out]."""
    solved = torch.zeros(mask.shape, dtype=torch.float64)
    for row, kept in enumerate(mask):
        solved[row, kept] = torch.linalg.lstsq(x[:, kept], target[:, row]).solution
    return solved


def errors(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """‖XŴᵀ − Y‖² / tokens of each row."""
    return (x @ weight.double().T - target).square().sum(0) / len(x)


@pytest.mark.parametrize("condition", [10.0, 1e3, 1e6])
def test_it_is_least_squares_on_the_kept_columns(condition):
    x, weight, mask = problem(0, condition=condition)
    gram = x.T @ x / len(x)
    best = errors(x, least_squares(x, x @ weight.T, mask), x @ weight.T)
    for dtype, slack in ((torch.float64, 1e-6), (torch.float32, 1e-2)):
        solved = solve_on_mask(weight, gram.to(dtype), mask, max_steps=200, tolerance=1e-6)
        assert solved.dtype == dtype and not solved[~mask].any()
        found = errors(x, solved, x @ weight.T)
        assert (found <= best * (1 + slack) + 1e-12).all()
        assert (found < 0.999 * errors(x, weight * mask, x @ weight.T)).all()


def test_outputs_of_another_path_are_met():
    x, weight, mask = problem(1)
    other = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    target = other @ weight.T
    solved = solve_on_mask(weight, x.T @ x / len(x), mask, cross=target.T @ x / len(x), tolerance=1e-8)
    torch.testing.assert_close(solved, least_squares(x, target, mask))


def test_a_start_that_is_exact_stays():
    x, weight, mask = problem(3)
    gram = (x.T @ x / len(x)).float()
    kept = (weight * mask).float()
    assert torch.equal(solve_on_mask(kept, gram, mask), kept)
    assert torch.equal(solve_on_mask(weight, gram, mask, max_steps=0), kept)


def test_dead_inputs_keep_their_start():
    x, weight, mask = problem(4)
    x[:, 3] = 0
    start = torch.full_like(weight, 7.0)
    solved = solve_on_mask(weight, x.T @ x / len(x), mask, start=start, damping=0.1)
    assert torch.equal(solved[:, 3], start[:, 3] * mask[:, 3])
    assert solved.isfinite().all()
    assert torch.equal(solve_on_mask(weight, torch.zeros(16, 16), mask, start=start), (start * mask).float())


def test_damping_holds_the_start():
    x, weight, mask = problem(5)
    gram, start = x.T @ x / len(x), weight * mask
    moved = [(solve_on_mask(weight, gram, mask, damping=d) - start).norm().item() for d in (0.0, 0.1, 1.0, 1e6)]
    assert moved == sorted(moved, reverse=True) and moved[-1] < 1e-5 * moved[0]
    ridge = 0.1 * gram.diagonal().mean()
    row = solve_on_mask(weight, gram, mask, damping=0.1, tolerance=1e-10)[0, mask[0]]
    system = gram[mask[0]][:, mask[0]] + ridge * torch.eye(8, dtype=torch.float64)
    expected = torch.linalg.solve(system, (weight[0] @ gram)[mask[0]] + ridge * start[0, mask[0]])
    torch.testing.assert_close(row, expected)


def test_rows_that_are_done_early_do_not_disturb_the_others():
    x, weight, mask = problem(6, out=12, condition=1e4)
    weight[::2] *= mask[::2]  # half of the rows have nothing to do
    gram = x.T @ x / len(x)
    together = solve_on_mask(weight, gram, mask, tolerance=1e-8)
    for row in range(12):
        alone = solve_on_mask(weight[row : row + 1], gram, mask[row : row + 1], tolerance=1e-8)
        torch.testing.assert_close(together[row], alone[0])


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    out=st.integers(1, 8),
    groups=st.integers(1, 8),
    tokens=st.integers(1, 60),
    condition=st.sampled_from([1.0, 1e2, 1e4, 1e6, 1e8]),
    damping=st.sampled_from([0.0, 0.01, 1.0]),
    steps=st.integers(0, 40),
)
def test_the_objective_never_grows(seed, out, groups, tokens, condition, damping, steps):
    width = 4 * groups
    x, weight, mask = problem(seed, out, width, max(tokens, width), condition)
    x = x[:tokens].float().double()  # fewer tokens than inputs: singular
    gram, start = (x.T @ x / tokens).float(), torch.randn_like(weight)
    solved = solve_on_mask(weight, gram, mask, start=start, damping=damping, max_steps=steps)
    before, after = (errors(x, w, x @ weight.T) for w in ((start * mask).float(), solved))
    assert (after <= before * (1 + 1e-5) + 1e-9).all()
    assert not solved[~mask].any()
