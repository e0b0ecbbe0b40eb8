"""Products with quantised values are those with the dense weight that integers and scales stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_ksparse import kernels
from optimum_ksparse.kernels import candidates
from optimum_ksparse.packing import pack
from optimum_ksparse.pattern import Pattern
from optimum_ksparse.quantization import LIMITS, TYPES, dequantize, pack_integers


def quantised(values: str, pattern: str, shape: tuple[int, int] = (6, 132), dtype: torch.dtype = torch.float32):
    """A random packed weight, with groups of 64 columns, and its dense form."""
    low, high = LIMITS[values]
    mask = Pattern(pattern).mask(torch.rand(shape))
    integers, bits = pack(torch.randint(low, high + 1, shape, dtype=torch.int8), mask, Pattern(pattern))
    scale = torch.rand(shape[0], -(-shape[1] // 64)).to(dtype)
    weight = kernels.PackedWeight(pack_integers(integers, values), bits, shape[1], pattern, None, scale, 64)
    return weight, dequantize(*weight[:3], scale, 64)


@given(
    values=st.sampled_from(sorted(LIMITS)),
    pattern=st.sampled_from(["2:4", "1:4", "3:4", "50%", "33%"]),
    shape=st.sampled_from([(1, 4), (3, 12), (5, 132), (2, 256)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_products_and_gradients_are_those_of_the_dense_weight(values, pattern, shape, dtype):
    weight, dense = quantised(values, pattern, shape, dtype)
    x = torch.randn(2, 3, shape[1], dtype=dtype, requires_grad=True)
    bias = torch.randn(shape[0], dtype=dtype)
    y = kernels.apply(x, weight, bias)
    expected = torch.nn.functional.linear(x, dense, bias)
    grad = torch.randn_like(y)
    (mine,) = torch.autograd.grad(y, x, grad)
    (theirs,) = torch.autograd.grad(expected, x, grad)
    tolerance = {"rtol": 2e-2, "atol": 4.0} if dtype != torch.float32 else {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(y, expected, **tolerance)
    torch.testing.assert_close(mine, theirs, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(kernels.apply(x, weight, bias), expected, **tolerance)
    assert torch.equal(kernels.decompress(*weight[:4], weight.scale, weight.group_size), dense)


@pytest.mark.parametrize("values", sorted(LIMITS))
def test_vmap_and_a_fake_run(values):
    weight, dense = quantised(values, "2:4")
    x = torch.randn(4, 3, 132)
    batched = torch.vmap(lambda row: kernels.apply(row, weight, None))(x)
    torch.testing.assert_close(batched, x @ dense.T, rtol=1e-4, atol=1e-3)
    meta = weight._replace(**{name: getattr(weight, name).to("meta") for name in ("values", "bits", "scale")})
    assert kernels.apply(x.to("meta"), meta, None).shape == (4, 3, 6)


@pytest.mark.parametrize("values", sorted(LIMITS))
def test_another_dtype_than_that_of_the_scale_is_refused(values):
    weight, _ = quantised(values, "2:4", dtype=torch.bfloat16)
    assert weight.dtype is torch.bfloat16 and weight.value_type == values == TYPES[weight.values.dtype]
    with pytest.raises(RuntimeError, match="bfloat16"):
        kernels.apply(torch.randn(1, 132), weight, None)
    assert kernels.apply(torch.randn(1, 132), weight.cast(torch.float32), None).dtype is torch.float32


@pytest.mark.parametrize("kernel", ["decompress", "library"])
def test_a_kernel_that_cannot_take_them_says_so(monkeypatch, kernel):
    """On a GPU that has it for other values."""
    monkeypatch.setattr(candidates.hardware, "why_no_kernels", lambda device: None)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    problem = kernels.Problem(256, 256, 1, "2:4", torch.bfloat16, torch.device("cuda"))
    assert candidates.KERNELS[kernel].why_not(problem) is None
    assert "int8" in candidates.KERNELS[kernel].why_not(replace(problem, value_type="int8"))
    weight, _ = quantised("int8", "2:4", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=kernel):
        kernels.choose(weight, 1, kernel)
