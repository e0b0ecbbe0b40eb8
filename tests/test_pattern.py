"""`Pattern`: parsing, exact masks and verification."""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_ksparse import Pattern

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
quick = settings(max_examples=40)


@st.composite
def structured(draw, largest=64):
    m = draw(st.integers(2, largest))
    return Pattern(f"{draw(st.integers(1, m - 1))}:{m}")


unstructured = st.one_of(
    st.integers(1, 99).map(lambda zeros: Pattern(f"{zeros}%")),
    st.tuples(st.integers(1, 30), st.integers(1, 30)).map(lambda pair: Pattern(f"{pair[0]}/{sum(pair)}")),
)


def draw_scores(draw, shape):
    """Scores of few different values, so that most are tied."""
    values = draw(st.sampled_from((1, 2, 3, 10, 1000)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scores = torch.randint(-values, values, shape, generator=generator) / 2
    return scores.to(draw(st.sampled_from(DTYPES)))


@st.composite
def grouped_scores(draw):
    pattern = draw(structured())
    leading = draw(st.lists(st.integers(0, 4), max_size=2))
    return pattern, draw_scores(draw, [*leading, pattern.m * draw(st.integers(1, 4))])


@st.composite
def row_scores(draw):
    leading = draw(st.lists(st.integers(0, 4), max_size=2))
    return draw(unstructured), draw_scores(draw, [*leading, draw(st.integers(1, 80))])


def slow_mask(scores, zeros, width):
    """The `zeros` first of each run of `width` scores go, in ascending order that keeps equals as they are."""
    kept = []
    for run in scores.reshape(-1, width).tolist():
        lowest = sorted(range(width), key=run.__getitem__)[:zeros]
        kept.append([i not in lowest for i in range(width)])
    return torch.tensor(kept, dtype=torch.bool).reshape(scores.shape)


@pytest.mark.parametrize(
    ("given_pattern", "n", "m", "sparsity"),
    [
        ("1:4", 1, 4, "3/4"),
        ("63:64", 63, 64, "1/64"),
        (" 2:4 ", 2, 4, "1/2"),
        ("50%", None, None, "1/2"),
        ("62.5%", None, None, "5/8"),
        ("29%", None, None, "29/100"),
        ("0.5", None, None, "1/2"),
        ("1/3", None, None, "1/3"),
        (0.5, None, None, "1/2"),
        (0.29, None, None, "29/100"),
        (Fraction(1, 3), None, None, "1/3"),
        (Pattern("2:4"), 2, 4, "1/2"),
        (Pattern("1/3"), None, None, "1/3"),
    ],
)
def test_every_form_is_parsed(given_pattern, n, m, sparsity):
    pattern = Pattern(given_pattern)
    assert (pattern.n, pattern.m) == (n, m)
    assert pattern.sparsity == Fraction(sparsity)
    assert pattern.density == float(1 - Fraction(sparsity))
    assert pattern.is_semi_structured == (n is not None)


@pytest.mark.parametrize("text", ["2:4", "12:64", "50%", "62.5%", "0.5", "1/3"])
def test_str_gives_back_the_text(text):
    assert str(Pattern(text)) == text
    assert repr(Pattern(text)) == f"Pattern({text!r})"
    assert str(Pattern(Pattern(text))) == text


def test_patterns_are_equal_by_meaning():
    assert Pattern("50%") == Pattern("0.5") == Pattern(0.5) == Pattern("1/2")
    assert len({Pattern("50%"), Pattern("0.5"), Pattern(0.5), Pattern("1/2")}) == 1
    assert len({Pattern("2:4"), Pattern("4:8"), Pattern("50%")}) == 3
    assert Pattern("2:4") != "2:4"


@pytest.mark.parametrize("text", ["2:4", "1/3"])
def test_patterns_are_copied_and_pickled(text):
    pattern = Pattern(text)
    for copied in (copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
        assert copied == pattern
        assert str(copied) == text


@pytest.mark.parametrize(
    "text",
    [
        *("2:3:4", "5:4", "0:4", "4:4", "2:x", ":4", "2:", "-2:4", "2.0:4", "2 : 4"),
        *("150%", "100%", "0%", "-50%", "50%%", "%", "0", "1", "1.0", "2", "1/1", "0/3", "1/0", "3/2"),
        *("", " ", "abc", "nan", "inf", "1e-9999", "1e9999"),
    ],
)
def test_other_text_is_rejected_with_what_is_allowed(text):
    with pytest.raises(ValueError, match='allowed: "n:m" with 0 < n < m.*"50%", "62.5%" or 0.5') as error:
        Pattern(text)
    assert repr(text.strip()) in str(error.value)


@pytest.mark.parametrize("number", [0, 1, 5, 0.0, 1.0, 1.5, -0.5, float("nan"), float("inf")])
def test_numbers_out_of_range_are_rejected(number):
    with pytest.raises(ValueError, match="allowed: "):
        Pattern(number)


@pytest.mark.parametrize("value", [True, False, None, (2, 4), b"2:4", [0.5], 0.5j])
def test_other_types_are_rejected(value):
    with pytest.raises(TypeError, match=f"found {type(value).__name__}; allowed: "):
        Pattern(value)


@pytest.mark.parametrize(
    ("text", "count", "zeros"),
    [
        ("29%", 100, 29),
        ("57%", 100, 57),
        ("58%", 50, 29),
        ("1/3", 9, 3),
        ("1/3", 10, 3),
        ("50%", 7, 3),
        ("2:4", 12, 6),
    ],
)
def test_number_of_zeros_is_exact(text, count, zeros):
    assert Pattern(text).num_zeros(count) == zeros


@given(st.integers(1, 999), st.integers(0, 10**15))
def test_number_of_zeros_has_no_rounding_error(thousandths, count):
    assert Pattern(thousandths / 1000).num_zeros(count) == count * thousandths // 1000


@given(grouped_scores())
@quick
def test_group_mask_is_a_stable_sort(case):
    pattern, scores = case
    assert torch.equal(pattern.mask(scores), slow_mask(scores, pattern.m - pattern.n, pattern.m))


@given(row_scores())
@quick
def test_row_mask_is_a_stable_sort(case):
    pattern, scores = case
    zeros = pattern.num_zeros(scores.shape[-1])
    assert torch.equal(pattern.mask(scores), slow_mask(scores, zeros, scores.shape[-1]))


@pytest.mark.parametrize("m", [32, 33, 64])
def test_groups_on_both_sides_of_the_sorting_limit(m):
    scores = torch.randint(5, (3, 2 * m), generator=torch.Generator().manual_seed(m)).float()
    assert torch.equal(Pattern(f"{m // 3}:{m}").mask(scores), slow_mask(scores, m - m // 3, m))


@pytest.mark.parametrize("text", ["2:4", "20:40", "50%"])
def test_mask_orders_infinities_and_does_not_change_the_scores(text):
    scores = torch.tensor([-torch.inf, torch.inf, 0.0, 1.0] * 10)
    before = scores.clone()
    assert Pattern(text).mask(scores).view(10, 4).tolist() == [[False, True, False, True]] * 10
    assert torch.equal(scores, before)


@pytest.mark.parametrize("text", ["2:4", "20:40", "50%"])
def test_mask_of_integers_and_of_strided_scores(text):
    scores = torch.arange(160).view(40, 4).T
    assert torch.equal(Pattern(text).mask(scores), Pattern(text).mask(scores.double().contiguous()))


@pytest.mark.parametrize("text", ["2:4", "20:40", "50%"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_scores_raise(text, dtype):
    scores = torch.zeros(2, 40, dtype=dtype)
    scores[1, 39] = torch.nan
    with pytest.raises(ValueError, match="scores contain NaN"):
        Pattern(text).mask(scores)


def test_groups_must_fill_the_rows():
    with pytest.raises(ValueError, match="q_proj has 10 input features, which m=4 of pattern 2:4 does not divide"):
        Pattern("2:4").check_shape(4, 10, "q_proj")
    with pytest.raises(ValueError, match="m=4 of pattern 2:4 does not divide"):
        Pattern("2:4").mask(torch.zeros(3, 10))
    with pytest.raises(ValueError, match="q_proj has 10 input features"):
        Pattern("2:4").verify(torch.zeros(3, 10), "q_proj")
    Pattern("50%").check_shape(3, 10)


@given(structured(16), st.integers(1, 5), st.integers(1, 5), st.data())
@quick
def test_verify_accepts_a_group_mask_and_rejects_one_weight_more(pattern, rows, groups, data):
    mask = pattern.mask(torch.rand(rows, groups * pattern.m))
    pattern.verify(mask.float())
    row, column = data.draw(st.sampled_from((~mask).nonzero().tolist()))
    mask[row, column] = True
    with pytest.raises(ValueError) as error:
        pattern.verify(mask.float(), "layers.3.q_proj")
    first = column // pattern.m * pattern.m
    assert f"layers.3.q_proj: row {row}, columns {first} to {first + pattern.m - 1}" in str(error.value)
    assert f"hold {pattern.n + 1} nonzero weights, pattern {pattern} allows {pattern.n}" in str(error.value)


@given(unstructured, st.integers(1, 5), st.integers(1, 60), st.data())
@quick
def test_verify_accepts_a_row_mask_and_rejects_one_weight_more(pattern, rows, columns, data):
    mask = pattern.mask(torch.rand(rows, columns))
    pattern.verify(mask.float())
    pattern.verify(pattern.mask(torch.rand(1, rows * columns)).view(rows, columns).float())
    if bool(mask.all()):
        return
    row, column = data.draw(st.sampled_from((~mask).nonzero().tolist()))
    mask[row, column] = True
    kept = int(mask.sum())
    with pytest.raises(ValueError, match=f"layers.3.q_proj has {kept} nonzero weights.*allows {kept - 1}"):
        pattern.verify(mask.float(), "layers.3.q_proj")


def test_verify_accepts_kept_zeros():
    Pattern("2:4").verify(torch.zeros(2, 8))
    Pattern("50%").verify(torch.zeros(2, 8))
