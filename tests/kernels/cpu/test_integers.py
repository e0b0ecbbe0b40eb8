"""The native product of values that are integers, forward and backward, beside float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_ksparse.kernels.cpu import NativeWeight, native, why_not_native
from optimum_ksparse.kernels.cpu.native import multiplies_in
from optimum_ksparse.nn import SparseLinear
from optimum_ksparse.packing import pack_mask, unpack_mask
from optimum_ksparse.pattern import Pattern
from optimum_ksparse.quantization import LIMITS, dequantize, pack_integers

from .test_native import DTYPES, TOLERANCE, masks, poisoned, relative_error, unit

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason=f"no native code here: {why_not_native()}")
__all__ = ["unit"]  # a fixture


def quantised(
    mask: torch.Tensor, per_row: bool, values: str, group_size: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[tuple[torch.Tensor, torch.Tensor, int, torch.Tensor, int], torch.Tensor]:
    """The arguments of `NativeWeight` for random integers and scales, between bytes that must not be read; the weight
    in float64."""
    low, high = LIMITS[values]
    integers = torch.randint(low, high + 1, mask.shape, dtype=torch.int8, generator=generator)
    scale = torch.rand(len(mask), -(-mask.shape[1] // group_size), generator=generator).to(dtype)
    kept = integers[mask].view(len(mask), -1) if per_row else integers[mask]
    packed = pack_integers(kept, values)
    around = torch.full((packed.numel() + 131,), -77 if values == "int8" else 255, dtype=packed.dtype)
    inside = around[67 : 67 + packed.numel()].view(packed.shape).copy_(packed)
    by_column = scale.double()[:, torch.arange(mask.shape[1]) // group_size]
    arguments = inside, poisoned(pack_mask(mask)), mask.shape[1], poisoned(scale), group_size
    return arguments, integers.double() * mask * by_column


@given(
    drawn=masks(),
    values=st.sampled_from(sorted(LIMITS)),
    group_size=st.sampled_from([64, 128, 192, 320]),
    tokens=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_forward_and_backward_are_those_of_the_dense_weight(drawn, values, group_size, tokens, dtype, has_bias):
    mask, per_row, generator = drawn
    out, columns = mask.shape
    arguments, dense = quantised(mask, per_row, values, group_size, dtype, generator)
    weight = NativeWeight(*arguments)
    x = poisoned(torch.randn(tokens, columns, generator=generator).to(dtype))
    grad = poisoned(torch.randn(tokens, out, generator=generator).to(dtype))
    bias = torch.randn(out, generator=generator).to(dtype) if has_bias else None
    wide, gradient, added = x.double(), grad.double(), 0 if bias is None else bias.double()
    results = weight.linear(x, bias), weight.grad_input(grad)
    references = wide @ dense.T + added, gradient @ dense
    sizes = wide.abs() @ dense.abs().T + abs(added), gradient.abs() @ dense.abs()
    # With more tokens, a CPU with products in 16 bit multiplies weights that are rounded to them.
    slack = 2 if multiplies_in(dtype) else 1
    for result, reference, size in zip(results, references, sizes, strict=True):
        assert result.dtype is dtype
        assert relative_error(result, reference, size) < slack * TOLERANCE[dtype]
    assert torch.equal(weight.dense(), dequantize(*arguments))


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 16, 24, 65])
@pytest.mark.parametrize("values", sorted(LIMITS))
@pytest.mark.parametrize("columns", [140, 9000])
def test_every_unit_computes_every_number_of_tokens(unit, tokens, values, columns):
    generator = torch.Generator().manual_seed(tokens)
    mask = torch.rand(37, columns, generator=generator) < 0.5
    arguments, dense = quantised(mask, False, values, 128, torch.float32, generator)
    weight, x = NativeWeight(*arguments), torch.randn(tokens, columns, generator=generator)
    grad = torch.randn(tokens, 37, generator=generator)
    assert relative_error(weight.linear(x, None), x.double() @ dense.T) < 3e-6
    assert relative_error(weight.grad_input(grad), grad.double() @ dense) < 3e-6
    assert torch.equal(weight.dense(), dequantize(*arguments))


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("values", sorted(LIMITS))
def test_a_scale_of_zero_gives_zero_and_tiny_ones_are_not_lost(values, tokens):
    mask = torch.ones(3, 128, dtype=torch.bool)
    (packed, bits, columns, scale, size), _ = quantised(mask, False, values, 64, torch.float32, torch.Generator())
    scale[0], scale[1], scale[2, 0] = 0, 1e-37, 0
    x = torch.ones(tokens, columns)
    y = NativeWeight(packed, bits, columns, scale, size).linear(x, None)
    expected = (x.double() @ dequantize(packed, bits, columns, scale, size).double().T).float()
    assert not y[:, 0].any()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=0)


@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([1, 3, 8, 40]),
    values=st.sampled_from(sorted(LIMITS)),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=30, deadline=None)
def test_masks_that_lie_are_told(seed, tokens, values, dtype):
    generator = torch.Generator().manual_seed(seed)
    out, columns = 13, 203
    count = int(torch.randint(1, 900, (1,), generator=generator))
    packed = pack_integers(torch.ones(count, dtype=torch.int8), values)
    bits = torch.randint(0, 256, (out, -(-columns // 8)), generator=generator, dtype=torch.uint8)
    weight = NativeWeight(packed, bits, columns, torch.ones(out, 4, dtype=dtype), 64)
    kept, stored = int(unpack_mask(bits, 8 * bits.shape[1]).sum()), weight._struct.num_values
    x, grad = torch.ones(tokens, columns, dtype=dtype), torch.ones(tokens, out, dtype=dtype)
    for product in (lambda: weight.linear(x, None), lambda: weight.grad_input(grad), weight.dense):
        if kept == stored or (values == "int4" and kept == stored - 1):
            assert product().isfinite().all()
        else:
            with pytest.raises(ValueError, match="weight_mask"):
                product()


@pytest.mark.parametrize(
    ("scale", "group_size"),
    [
        (torch.ones(4, 2), 64),
        (torch.ones(4, 3), 70),
        (torch.ones(4, 3), 0),
        (torch.ones(4, 3, dtype=torch.float64), 64),
        (torch.ones(3, 4).T, 64),
    ],
)
def test_a_scale_that_does_not_fit_is_refused(scale, group_size):
    with pytest.raises(ValueError, match="scale"):
        NativeWeight(
            torch.ones(4, 65, dtype=torch.int8), torch.zeros(4, 17, dtype=torch.uint8), 130, scale, group_size
        )


@torch.no_grad()
def test_a_group_may_be_larger_than_any_number_of_the_library():
    mask = torch.ones(3, 70, dtype=torch.bool)
    (*tensors, _), dense = quantised(mask, True, "int8", 128, torch.float32, torch.Generator().manual_seed(0))
    x = torch.randn(1, 70)
    result = NativeWeight(*tensors, 2**64).linear(x, None)
    torch.testing.assert_close(result.double(), x.double() @ dense.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("values", sorted(LIMITS))
@torch.no_grad()
def test_a_layer_takes_native_code_and_sees_other_scales(monkeypatch, values):
    generator = torch.Generator().manual_seed(0)
    mask = Pattern("2:4").mask(torch.rand(24, 64, generator=generator))
    (packed, bits, _, scale, _), _ = quantised(mask, True, values, 64, torch.float32, generator)
    sparse = SparseLinear(64, 24, bias=False, pattern=Pattern("2:4"), values=values, group_size=64)
    sparse.load_state_dict({"weight": packed, "weight_mask": bits, "weight_scale": scale})
    x = torch.randn(1, 64, generator=generator)
    before = sparse(x)
    assert isinstance(sparse._native, NativeWeight)
    torch.testing.assert_close(before, x @ sparse.to_dense_weight().T, rtol=1e-4, atol=1e-3)
    sparse.weight_scale.mul_(2)
    torch.testing.assert_close(sparse(x), 2 * before)
    sparse.weight_scale = sparse.weight_scale * 2
    torch.testing.assert_close(sparse(x), 4 * before)
    sparse.bfloat16()
    assert sparse(x.bfloat16()).dtype is torch.bfloat16
    monkeypatch.setattr(native, "_library", lambda: "broken")
    sparse.kernel = "reference"
    torch.testing.assert_close(sparse(x.bfloat16()).float(), 4 * before, rtol=2e-2, atol=4)
