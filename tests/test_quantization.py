"""Kept values as integers: what is packed is unpacked, and the dense weight is each integer times its scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_ksparse.packing import pack
from optimum_ksparse.pattern import Pattern
from optimum_ksparse.quantization import (
    LIMITS,
    check_quantised,
    dequantize,
    pack_integers,
    to_integers,
    unpack_integers,
)


@given(
    values=st.sampled_from(sorted(LIMITS)), rows=st.integers(0, 4), count=st.integers(0, 17), seed=st.integers(0, 99)
)
def test_packed_integers_are_unpacked(values: str, rows: int, count: int, seed: int) -> None:
    low, high = LIMITS[values]
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(low, high + 1, (rows, count), dtype=torch.int8, generator=generator)
    packed = pack_integers(integers, values)
    assert packed.shape == (rows, count if values == "int8" else -(-count // 2))
    assert torch.equal(unpack_integers(packed, count), integers)


@pytest.mark.parametrize("values", sorted(LIMITS))
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "50%"])
@pytest.mark.parametrize("group_size", [64, 192])
def test_the_dense_weight_is_each_integer_times_its_scale(values: str, pattern: str, group_size: int) -> None:
    low, high = LIMITS[values]
    integers = torch.randint(low, high + 1, (5, 132), dtype=torch.int8)
    mask = Pattern(pattern).mask(torch.rand(5, 132))
    scale = torch.rand(5, -(-132 // group_size)).bfloat16()
    kept, bits = pack(integers, mask, Pattern(pattern))
    dense = dequantize(pack_integers(kept, values), bits, 132, scale, group_size)
    groups = torch.arange(132) // group_size
    assert dense.dtype is torch.bfloat16
    assert torch.equal(dense, (integers.double() * mask * scale.double()[:, groups]).bfloat16())


@pytest.mark.parametrize("values", sorted(LIMITS))
def test_integers_are_the_nearest_ones_and_zero_where_a_scale_is(values: str) -> None:
    low, high = LIMITS[values]
    weight = torch.tensor([[0.0, 1.4, -1.6, 1e9, -1e9], [0.0, 1.0, -1.0, 1e9, float("-inf")]])
    integers = to_integers(weight, torch.tensor([[1.0], [0.0]]), 64, values)
    assert integers.tolist() == [[0, 1, -2, high, low], [0, 0, 0, 0, 0]] and integers.dtype is torch.int8


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), float("-inf"), -1.0])
@pytest.mark.parametrize("values", sorted(LIMITS))
def test_a_scale_that_is_none_is_told_from_one_without_room(values: str, spoilt: float) -> None:
    packed, scale = pack_integers(torch.ones(2, 4, dtype=torch.int8), values), torch.ones(2, 1).half()
    check_quantised(packed, scale, "up")
    for wrong, message in ((spoilt, "NaN, infinity or negative.*damaged"), (60000.0, "no room in torch.float16")):
        scale[1] = wrong
        with pytest.raises(ValueError, match=f"^up.weight_scale .*{message}"):
            check_quantised(packed, scale, "up")
