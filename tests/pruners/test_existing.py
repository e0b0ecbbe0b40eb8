"""The method that keeps the zeros of a weight: which pattern it finds, and what mask it makes."""

from __future__ import annotations

import pytest
import torch

from optimum_ksparse import Pattern, SparsityConfig, prune_weight
from optimum_ksparse.pruners.existing import commonest, exact_groups, recognise


def weight_of(pattern: str, shape: tuple[int, int] = (64, 96), seed: int = 0) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1))
    return weight * Pattern(pattern).mask_of_layer(scores)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:4", "2:8", "8:16", "6:8", "16:32", "5:16"])
def test_the_n_of_m_of_a_weight_is_found(pattern):
    assert str(recognise(weight_of(pattern))) == pattern


def test_the_sparsest_pattern_that_holds_is_found_in_the_smallest_groups():
    assert str(recognise(weight_of("2:4"))) == "2:4"  # and 4:8, and 8:16
    one_of_two = torch.zeros(8, 8)
    one_of_two[:, ::2] = 1
    assert str(recognise(one_of_two)) == "2:4"
    assert str(recognise(torch.zeros(8, 64))) == "1:32"


@pytest.mark.parametrize("share", ["50%", "90%", "13%"])
@pytest.mark.parametrize("columns", [96, 30])
def test_zeros_anywhere_are_unstructured_and_not_one_is_added(share, columns):
    weight = weight_of(share, (64, columns))
    pattern = recognise(weight)
    assert not pattern.is_semi_structured
    pattern.verify(weight)
    assert abs(float(pattern.sparsity) - float((weight == 0).float().mean())) < 1e-5


def test_a_pattern_in_groups_needs_groups_that_fill_the_rows():
    assert str(recognise(weight_of("2:4", (8, 28)))) == "2:4"
    assert "%" in str(recognise(torch.nn.functional.pad(weight_of("2:4", (8, 28)), (0, 2))))


def test_a_few_zeros_leave_a_weight_dense():
    weight = torch.randn(64, 64)
    assert recognise(weight) is None
    weight[:7] = 0  # outputs that have died
    assert recognise(weight) is None
    weight[:8] = 0
    assert recognise(weight) is not None


def test_a_small_weight_that_keeps_to_groups_by_chance_is_unstructured():
    weight = torch.zeros(4, 32)
    weight[0, :6] = weight[2, 8:13] = 1  # 6:8 would store 96 of 11
    assert "%" in str(recognise(weight))


def test_a_stack_has_the_pattern_of_all_its_matrices_or_none():
    stack = torch.stack([weight_of("2:4", seed=seed) for seed in range(3)])
    assert str(recognise(stack)) == "2:4"
    stack[1] = weight_of("50%")
    assert recognise(stack) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%", "50%/8x8"])
def test_weights_stay_as_they_are_and_the_mask_is_full(pattern, dtype):
    weight = weight_of(pattern).to(dtype)
    weight[3, :20] = 0  # more zeros than the pattern asks for
    before = weight.clone()
    pruned, mask = prune_weight(weight, None, method="existing", pattern=pattern)
    assert torch.equal(pruned, before) and torch.equal(weight, before)
    assert bool(mask[weight != 0].all())
    if Pattern(pattern).is_semi_structured:
        assert torch.equal(mask, Pattern(pattern).mask(weight.abs()))
        assert bool((mask.unflatten(1, (-1, Pattern(pattern).m)).sum(-1) == Pattern(pattern).n).all())
    elif "/" not in pattern:
        assert torch.equal(mask, weight != 0)


def test_a_weight_without_the_pattern_is_refused_with_the_place():
    weight = weight_of("2:4")
    weight[5, 8:12] = 1
    with pytest.raises(ValueError, match=r"row 5, columns 8 to 11.*2:4"):
        prune_weight(weight, None, method="existing", pattern="2:4")


def test_masks_that_keep_to_groups_exactly():
    mask = weight_of("4:8") != 0
    assert str(exact_groups(mask)) == "4:8"
    mask[0, 0] = not mask[0, 0]
    assert exact_groups(mask) is None
    assert exact_groups(torch.ones(2, 8, dtype=torch.bool)) is None
    assert exact_groups(torch.zeros(2, 8, dtype=torch.bool)) is None


def test_what_stands_for_all_layers():
    assert commonest(["2:4", "4:8", "4:8", "50%"]) == "4:8"
    assert commonest(["40%", "60%", "50%", "2:4"]) == "50%"


@pytest.mark.parametrize("settings", [{"refine": "exact"}, {"reconstruct": "block"}, {"allocation": "owl"}])
def test_what_changes_weights_is_refused(settings):
    with pytest.raises(ValueError, match=r"existing|owl"):
        SparsityConfig("existing", **settings)
