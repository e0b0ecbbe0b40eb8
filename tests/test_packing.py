"""The packed form: round trips, bit order, size and checks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_ksparse import Pattern
from optimum_ksparse.packing import check_bits, pack, pack_mask, unpack, unpack_mask, values_shape

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {4: torch.int32, 2: torch.int16}
quick = settings(max_examples=40)


def same_bits(a, b):
    """Equal bit for bit: -0.0 is not 0.0, and NaN is itself."""
    integer = INTEGERS[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


@st.composite
def structured_cases(draw):
    m = draw(st.integers(2, 20))
    pattern = Pattern(f"{draw(st.integers(1, m - 1))}:{m}")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scores = torch.rand(draw(st.integers(1, 6)), m * draw(st.integers(1, 5)), generator=generator)
    return pattern, pattern.mask(scores), draw_weight(draw, scores.shape, generator)


@st.composite
def unstructured_cases(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 40)))
    mask = torch.rand(shape, generator=generator) < draw(st.floats(0, 1))
    return Pattern("50%"), mask, draw_weight(draw, shape, generator)


def draw_weight(draw, shape, generator):
    weight = torch.randn(shape, generator=generator).to(draw(st.sampled_from(DTYPES)))
    for special in (0.0, -0.0, torch.inf, torch.nan):
        weight[torch.rand(shape, generator=generator) < 0.1] = special
    return weight


@given(st.one_of(structured_cases(), unstructured_cases()))
@quick
def test_unpack_gives_back_what_was_kept_bit_for_bit(case):
    pattern, mask, weight = case
    values, bits = pack(weight, mask, pattern)
    assert same_bits(unpack(values, bits, weight.shape[1]), torch.where(mask, weight, 0))
    check_bits(bits, pattern, weight.shape[1], int(mask.sum()), "weight_mask")


@given(st.one_of(structured_cases(), unstructured_cases()))
@quick
def test_shapes_and_order_of_the_packed_form(case):
    pattern, mask, weight = case
    rows, columns = weight.shape
    values, bits = pack(weight, mask, pattern)
    assert values.dtype == weight.dtype
    assert tuple(values.shape) == values_shape(pattern, rows, columns, int(mask.sum()))
    assert values.shape == ((rows, columns * pattern.n // pattern.m) if pattern.m else (int(mask.sum()),))
    assert bits.dtype == torch.uint8
    assert bits.shape == (rows, -(-columns // 8))
    row_major = [weight[i, j] for i in range(rows) for j in range(columns) if mask[i, j]]
    assert same_bits(values.flatten(), torch.stack(row_major) if row_major else weight.new_empty(0))


@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**32))
@quick
def test_bit_k_of_byte_b_is_weight_8b_plus_k_and_padding_is_zero(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack_mask(mask)
    for row, kept in zip(bits.tolist(), mask.tolist(), strict=True):
        assert row == [
            sum(bit << k for k, bit in enumerate(kept[8 * byte : 8 * byte + 8])) for byte in range(len(row))
        ]
    assert torch.equal(unpack_mask(bits, columns), mask)


def test_bit_order_of_an_example():
    kept = [0, 9, 10]
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, kept] = True
    values, bits = pack(torch.arange(12.0).view(1, 12), mask, Pattern("75%"))
    assert bits.tolist() == [[0b00000001, 0b00000110]]
    assert values.tolist() == kept


def test_a_transposed_weight_is_packed_row_by_row():
    weight = torch.randn(8, 6).T
    mask = Pattern("2:4").mask(weight.abs())
    for found, expected in zip(
        pack(weight, mask, Pattern("2:4")), pack(weight.contiguous(), mask, Pattern("2:4")), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float32, 0.53125), (torch.bfloat16, 0.5625), (torch.float16, 0.5625)]
)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%"])
def test_bytes_at_half_density(dtype, share, pattern):
    weight = torch.randn(5, 64, dtype=dtype)
    mask = Pattern(pattern).mask(weight.abs())
    assert sum(tensor.nbytes for tensor in pack(weight, mask, Pattern(pattern))) == share * weight.nbytes


@pytest.mark.parametrize("shape", [(4, 7), (8, 4), (32,)])
def test_pack_refuses_a_mask_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"weight \[4, 8\] and mask .* must have the same shape \[out, in\]"):
        pack(torch.ones(4, 8), torch.ones(shape, dtype=torch.bool), Pattern("2:4"))


@pytest.mark.parametrize("change", [(0, 0), (1, 7)])
def test_pack_refuses_groups_of_another_count(change):
    mask = torch.tensor([[True, True, False, False] * 2] * 2)
    mask[change] = ~mask[change]
    with pytest.raises(ValueError, match="mask does not keep exactly 2 weights in every 4"):
        pack(torch.ones(2, 8), mask, Pattern("2:4"))


def test_pack_refuses_rows_that_groups_do_not_fill():
    with pytest.raises(ValueError, match="m=4 of pattern 2:4 does not divide"):
        pack(torch.ones(2, 10), torch.ones(2, 10, dtype=torch.bool), Pattern("2:4"))


@pytest.mark.parametrize(
    ("pattern", "num_values", "message"),
    [
        ("2:4", 17, "num_values is 17, pattern 2:4 stores 16"),
        ("50%", 33, "num_values is 33, the weight has 32 places"),
        ("50%", -1, "num_values is -1"),
        ("50%", "16", "num_values is '16'"),
        ("50%", 16.0, "num_values is 16.0"),
        ("3:5", 16, "m=5 of pattern 3:5 does not divide"),
    ],
)
def test_values_shape_refuses(pattern, num_values, message):
    with pytest.raises(ValueError, match=message):
        values_shape(Pattern(pattern), 4, 8, num_values)


def test_check_bits_accepts_all_and_none_kept():
    for kept in (True, False):
        mask = torch.full((3, 10), kept)
        check_bits(pack_mask(mask), Pattern("50%"), 10, int(mask.sum()), "weight_mask")


def test_check_bits_refuses_padding_bits():
    bits = pack_mask(torch.ones(2, 10, dtype=torch.bool))
    bits[1, 1] |= 0b100
    with pytest.raises(ValueError, match="q_proj.weight_mask: padding bits behind input feature 10 are set"):
        check_bits(bits, Pattern("50%"), 10, 21, "q_proj.weight_mask")


def test_check_bits_refuses_another_population_or_count_in_a_group():
    bits = pack_mask(torch.tensor([[True, True, True, False, True, False, False, False]]))
    check_bits(bits, Pattern("50%"), 8, 4, "q_proj.weight_mask")
    with pytest.raises(ValueError, match="q_proj.weight_mask keeps 4 weights, but there are 5 values"):
        check_bits(bits, Pattern("50%"), 8, 5, "q_proj.weight_mask")
    with pytest.raises(ValueError, match="q_proj.weight_mask does not keep exactly 2"):
        check_bits(bits, Pattern("2:4"), 8, 4, "q_proj.weight_mask")
