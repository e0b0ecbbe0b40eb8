"""ADMM, ALPS and what refines a mask, against slow and obvious references."""

from __future__ import annotations

import itertools

import pytest
import torch

from optimum_ksparse import Pattern, SparsityConfig, prune_weight
from optimum_ksparse.pruners import METHODS, REFINEMENTS, prune, swaps
from optimum_ksparse.pruners.scaled import finite
from optimum_ksparse.pruners.statistics import GramMatrix
from optimum_ksparse.pruners.swaps import swap

CHOOSING = [name for name, method in METHODS.items() if method.recognise is None]  # which zeros to make


def make_problem(out=5, width=16, tokens=200, seed=0):
    """A weight, correlated inputs of different scales, and their statistics."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    x = torch.randn(tokens, width, generator=generator) @ mixing * torch.logspace(-1, 1, width)
    statistics = GramMatrix(width)
    statistics.update(x)
    return torch.randn(out, width, generator=generator), x, statistics


def row_errors(weight, pruned, gram):
    """(w − ŵ)ᵀH(w − ŵ) of each row, float64."""
    difference = (weight - pruned).double()
    return ((difference @ gram.double()) * difference).sum(1)


def slow_admm(weight, gram, pattern, damping, iterations):
    """The formulas one by one, in float64, with masks by sorting."""
    scale = gram.double().diagonal().sqrt()
    scale = scale.clamp(min=0.3 * scale.median())
    scaled = gram.double() / scale / scale.unsqueeze(1) + damping * torch.eye(len(gram), dtype=torch.float64)
    dense = weight.double() * scale
    penalties = [0.3] * 5 + [0.55] * 5 + [1.0] * 10 if pattern.m else [1.0] * 20
    updated, dual = dense.clone(), torch.zeros_like(dense)
    moving = round(0.75 * iterations)
    for step in range(1, iterations + 1):
        if step <= moving:
            mask = torch.ones_like(dense)
            groups = [range(g, g + pattern.m) for g in range(0, dense.shape[1], pattern.m)] if pattern.m else None
            share = pattern.sparsity if groups else float(pattern.sparsity) * (1 - (1 - step / moving) ** 3)
            for row, scores in enumerate((updated + dual).abs().tolist()):
                for columns in groups or [range(dense.shape[1])]:
                    order = sorted(columns, key=lambda j: (scores[j], j))
                    mask[row, order[: int(len(order) * share + 1e-9)]] = 0
        kept = (updated + dual) * mask
        penalty, before = penalties[step - 1], penalties[max(0, step - 2)]
        dual = (dual + updated - kept) * before / penalty
        inverse = torch.linalg.inv(scaled + penalty * torch.eye(len(gram), dtype=torch.float64))
        updated = (dense @ scaled + penalty * (kept - dual)) @ inverse
    return (updated + dual) * mask / scale, mask.bool()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:3", "50%", "75%"])
def test_admm_is_the_formulas(pattern):
    weight, _, statistics = make_problem(width=24)
    pruned, mask = prune("admm", weight, statistics, Pattern(pattern), damping=0.1, iterations=20)
    expected, expected_mask = slow_admm(weight, statistics.gram, Pattern(pattern), 0.1, 20)
    assert torch.equal(mask, expected_mask)
    assert torch.allclose(pruned.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["admm", "alps"])
def test_weights_of_rare_inputs_do_not_fit_the_few_tokens_that_have_them(method):
    """ReLU features, some of which a token in a thousand has: on other tokens no worse than SparseGPT."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(512, 128, generator=generator) / 128**0.5
    shift = -torch.linspace(0, 4, 512)
    seen, others = (torch.relu(torch.randn(n, 128, generator=generator) @ mixing.T + shift) for n in (4096, 20000))
    weight = 0.05 * torch.randn(128, 512, generator=generator)
    errors = {}
    for name in (method, "sparsegpt"):
        pruned, _ = prune_weight(weight, seen, method=name, pattern="2:4")
        errors[name] = float((others @ (pruned - weight).T).norm())
        assert pruned.abs().max() < 10 * weight.abs().max()
    assert errors[method] < errors["sparsegpt"]


@pytest.mark.parametrize("settings", [{"method": "admm"}, {"method": "alps"}, {"method": "wanda", "refine": "exact"}])
def test_a_faint_input_does_not_overflow_float16(settings):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator)
    x[:, 7] = 0
    x[3, 7] = 6e-6
    weight = torch.randn(32, 64, generator=generator).half()
    pruned, _ = prune_weight(weight, x, pattern="2:4", **settings)
    assert pruned.isfinite().all()


def test_what_overflows_a_dtype_is_told():
    with pytest.raises(ValueError, match="too large for torch.float16: load the model in bfloat16"):
        finite(torch.tensor([[1e6, 1.0]]), torch.float16)
    with pytest.raises(ValueError, match="NaN or Inf"):
        finite(torch.tensor([[torch.nan, 1.0]]), torch.float16)


@pytest.mark.parametrize("method", ["admm", "alps"])
@pytest.mark.parametrize("pattern", ["1:2", "2:4"])
def test_masks_come_near_to_the_best_of_all(method, pattern):
    """Of one row of eight weights, against every mask with its exact weights."""
    ratios = []
    for seed in range(10):
        weight, x, statistics = make_problem(1, 8, seed=seed)
        best = min(
            float(row_errors(weight, exact_row(weight, x, mask), statistics.gram))
            for mask in all_masks(Pattern(pattern), 8)
        )
        pruned, _ = prune(method, weight, statistics, Pattern(pattern), refine=["exact"], damping=1e-3)
        ratios.append(float(row_errors(weight, pruned, statistics.gram)) / best)
    assert min(ratios) > 0.999
    assert sorted(ratios)[len(ratios) // 2] < 1.5


def all_masks(pattern, width):
    groups = list(itertools.combinations(range(pattern.m), pattern.n))
    for chosen in itertools.product(groups, repeat=width // pattern.m):
        mask = torch.zeros(1, width, dtype=torch.bool)
        for group, kept in enumerate(chosen):
            mask[0, [group * pattern.m + j for j in kept]] = True
        yield mask


def exact_row(weight, x, mask):
    """The weights of least output error on the mask, row by row."""
    solved = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        target = (x @ weight[row]).unsqueeze(1)
        solved[row, kept] = torch.linalg.lstsq(x[:, kept].double(), target.double()).solution.squeeze(1).float()
    return solved


def test_alps_keeps_the_mask_once_it_does_not_move():
    weight, _, statistics = make_problem(8, 32)
    some = prune("alps", weight, statistics, Pattern("2:4"), iterations=150)
    more = prune("alps", weight, statistics, Pattern("2:4"), iterations=300)
    assert torch.equal(some[0], more[0])


@pytest.mark.parametrize("method", CHOOSING)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%"])
def test_exact_is_least_squares_on_the_mask_of_any_method(method, pattern):
    weight, x, statistics = make_problem(width=24)
    found, mask = prune(method, weight, statistics, Pattern(pattern), refine=["exact"])
    _, own_mask = prune(method, weight, statistics, Pattern(pattern))
    assert torch.equal(mask, own_mask)
    expected = row_errors(weight, exact_row(weight, x, mask), statistics.gram)
    assert torch.allclose(row_errors(weight, found, statistics.gram), expected, rtol=0.05, atol=1e-6)


def slow_swap(weight, gram, pruned, mask, pattern):
    """Every pair of every row tried by computing the whole error, the best taken, until none helps."""
    values, kept = pruned.clone(), mask.clone()
    for row in range(len(weight)):
        while True:
            now = float(row_errors(weight[row : row + 1], values[row : row + 1], gram))
            best, chosen = now * (1 - 1e-6) - 1e-9, None
            for p, u in itertools.product((~kept[row]).nonzero().flatten(), kept[row].nonzero().flatten()):
                if pattern.m is not None and p // pattern.m != u // pattern.m:
                    continue
                tried = values[row].clone()
                tried[p], tried[u] = weight[row, p], 0
                error = float(row_errors(weight[row : row + 1], tried.unsqueeze(0), gram))
                if error < best:
                    best, chosen = error, (p, u, tried)
            if chosen is None:
                break
            p, u, values[row] = chosen
            kept[row, p], kept[row, u] = True, False
    return values, kept


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "50%"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_swaps_are_those_of_an_exhaustive_search(method, pattern):
    weight, _, statistics = make_problem(4, 16, seed=1)
    pattern = Pattern(pattern)
    pruned, mask = prune(method, weight, statistics, pattern)
    found, found_mask = swap(weight, statistics, pattern, pruned, mask)
    expected, expected_mask = slow_swap(weight, statistics.gram, pruned, mask, pattern)
    assert torch.equal(found_mask, expected_mask)
    assert torch.allclose(found, expected)
    assert not torch.equal(found_mask, mask)


@pytest.mark.parametrize("pattern", ["2:4", "50%", "29%"])
@pytest.mark.parametrize("candidates", [1, 3, 64])
def test_swaps_never_raise_the_error_of_a_row_and_keep_the_pattern(monkeypatch, pattern, candidates):
    monkeypatch.setattr(swaps, "_CANDIDATES", candidates)
    weight, _, statistics = make_problem(32, 48, seed=2)
    pattern = Pattern(pattern)
    pruned, mask = prune("wanda", weight, statistics, pattern)
    found, found_mask = swap(weight, statistics, pattern, pruned, mask)
    before, after = (row_errors(weight, w, statistics.gram) for w in (pruned, found))
    assert bool((after <= before * (1 + 1e-6)).all()) and float(after.sum()) < float(before.sum())
    assert torch.equal(found_mask.sum(1), mask.sum(1))
    pattern.verify(found)
    assert torch.equal(found, torch.where(found_mask, weight, 0))  # weights that nobody updated stay the dense ones


@pytest.mark.parametrize("method", CHOOSING)
def test_refinements_follow_each_other(method):
    weight, x, _ = make_problem(16, 32)
    errors = []
    for refine in ([], ["swaps"], ["swaps", "exact"]):
        pruned, mask = prune_weight(weight, x, method=method, pattern="2:4", refine=refine)
        Pattern("2:4").verify(pruned)
        assert bool((pruned[~mask] == 0).all())
        errors.append(float(torch.linalg.norm(x @ (pruned - weight).T)))
    assert errors[0] >= errors[1] >= errors[2]


@pytest.mark.parametrize("method", ["admm", "alps"])
def test_dead_inputs_lose_their_weights_first(method):
    weight, x, _ = make_problem(6, 16)
    x[:, [0, 5]] = 0
    pruned, mask = prune_weight(weight, x, method=method, pattern="2:4")
    assert bool(pruned.isfinite().all())
    assert not bool(mask[:, [0, 5]].any())


def test_a_refined_method_without_data_needs_data():
    weight = make_problem(4, 16)[0]
    with pytest.raises(ValueError, match="inputs must be"):
        prune_weight(weight, None, method="magnitude", pattern="2:4", refine="exact")
    assert SparsityConfig("magnitude", dataset=None).needs_data is False
    assert SparsityConfig("magnitude", dataset=["text"], refine="exact").needs_data is True
    assert list(REFINEMENTS) == ["exact", "swaps"]
