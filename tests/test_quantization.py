"""Kept values as integers: what is packed is unpacked, and the dense weight is each integer times its scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_ksparse.packing import pack
from optimum_ksparse.pattern import Pattern
from optimum_ksparse.quantization import LIMITS, dequantize, pack_integers, unpack_integers


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
