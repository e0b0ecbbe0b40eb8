"""The native product of packed weights, forward and backward, beside float64."""

import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_ksparse.kernels import PackedWeight, choose, operators
from optimum_ksparse.kernels.cpu import NativeWeight, native, why_not_native
from optimum_ksparse.nn import SparseLinear
from optimum_ksparse.packing import pack_mask, unpack_mask
from optimum_ksparse.pattern import Pattern

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason=f"no native code here: {why_not_native()}")

# Relative errors, in the norm: of the sums in float32, and of rounding the result.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
DTYPES = tuple(TOLERANCE)


@pytest.fixture(params=[False, True], ids=["best", "portable"])
def unit(request, monkeypatch):
    """The unit that this CPU takes, and plain C."""
    if request.param:
        portable = native._library()._replace(unit=_portable(), name="portable")
        monkeypatch.setattr(native, "_library", lambda: portable)


def _portable() -> int:
    import ctypes

    runs = ctypes.c_int32()
    functions = native._library().functions
    return next(i for i in range(8) if functions.ksparse_unit(i, ctypes.byref(runs)) == b"portable")


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers between others that must not be read: NaN, or set bits."""
    fill = 255 if tensor.dtype == torch.uint8 else float("nan")
    around = torch.full((tensor.numel() + 131,), fill, dtype=tensor.dtype)
    inside = around[67 : 67 + tensor.numel()].view(tensor.shape)
    inside.copy_(tensor)
    return inside


def packed(weight: torch.Tensor, mask: torch.Tensor, per_row: bool, dtype: torch.dtype) -> tuple:
    values = weight[mask].to(dtype)
    values = values.view(len(weight), -1) if per_row else values
    dense = (weight.to(dtype) * mask).double()
    return poisoned(values), poisoned(pack_mask(mask)), dense


def relative_error(result: torch.Tensor, reference: torch.Tensor, size: torch.Tensor | None = None) -> float:
    """In the norm; to the size of what was summed, where a few sums may cancel."""
    size = reference if size is None else size
    return ((result.double() - reference).norm() / size.norm().clamp_min(1e-30)).item()


@st.composite
def masks(draw):
    """Masks [out, in] of any kind: n:m, and rows from empty to full; and whether all rows keep equally many."""
    out = draw(st.integers(1, 75))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["1:4", "2:4", "4:8", "8:16", "3:5", "rows", "all", "none"]))
    if ":" in kind:
        pattern = Pattern(kind)
        columns = pattern.m * draw(st.integers(1, 300 // pattern.m))
        if 64 % pattern.m == 0 and draw(st.booleans()):
            columns = -(-columns // 64) * 64  # where units read whole words of the mask
        return pattern.mask(torch.rand(out, columns, generator=generator)), True, generator
    columns = draw(st.integers(1, 300))
    if kind == "rows":
        density = torch.rand(out, 1, generator=generator) * 1.2 - 0.1
        return torch.rand(out, columns, generator=generator) < density, False, generator
    return torch.full((out, columns), kind == "all"), False, generator


@given(drawn=masks(), tokens=st.integers(1, 200), dtype=st.sampled_from(DTYPES), has_bias=st.booleans())
@settings(max_examples=60, deadline=None)
def test_forward_and_backward_are_those_of_the_dense_weight(drawn, tokens, dtype, has_bias):
    mask, per_row, generator = drawn
    out, columns = mask.shape
    values, bits, dense = packed(torch.randn(mask.shape, generator=generator), mask, per_row, dtype)
    weight = NativeWeight(values, bits, columns)
    x = poisoned(torch.randn(tokens, columns, generator=generator).to(dtype))
    grad = poisoned(torch.randn(tokens, out, generator=generator).to(dtype))
    bias = torch.randn(out, generator=generator).to(dtype) if has_bias else None
    wide, gradient, added = x.double(), grad.double(), 0 if bias is None else bias.double()
    results = weight.linear(x, bias), weight.grad_input(grad), weight.grad_values(grad, x)
    references = wide @ dense.T + added, gradient @ dense, (gradient.T @ wide)[mask]
    wide, gradient, magnitude, added = wide.abs(), gradient.abs(), dense.abs(), abs(added)
    sizes = wide @ magnitude.T + added, gradient @ magnitude, (gradient.T @ wide)[mask]
    for result, reference, size in zip(results, references, sizes, strict=True):
        assert relative_error(result, reference, size) < TOLERANCE[result.dtype]
    assert torch.equal(weight.dense(), dense.to(dtype))


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 16, 23, 24, 64, 65, 513])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_unit_computes_every_number_of_tokens(unit, tokens, dtype):
    generator = torch.Generator().manual_seed(tokens)
    mask = torch.rand(19, 7000 if tokens == 1 else 140, generator=generator) < 0.5
    values, bits, dense = packed(torch.randn(mask.shape, generator=generator), mask, False, dtype)
    weight = NativeWeight(values, bits, mask.shape[1])
    x = torch.randn(tokens, mask.shape[1], generator=generator).to(dtype)
    grad = torch.randn(tokens, 19, generator=generator).to(dtype)
    assert relative_error(weight.linear(x, None), x.double() @ dense.T) < TOLERANCE[dtype]
    assert relative_error(weight.grad_input(grad), grad.double() @ dense) < TOLERANCE[dtype]
    assert relative_error(weight.grad_values(grad, x), (grad.double().T @ x.double())[mask]) < TOLERANCE[dtype]
    assert torch.equal(weight.dense(), dense.to(dtype))


@pytest.mark.parametrize("tokens", [1, 4, 8, 64])
def test_a_row_does_not_depend_on_the_rows_beside_it(tokens):
    """Infinities and NaN stay in their rows and tokens, and zeros of the mask are not multiplied."""
    mask = torch.rand(9, 130, generator=torch.Generator().manual_seed(0)) < 0.5
    values, bits, _ = packed(torch.ones(mask.shape), mask, False, torch.float32)
    values[: int(mask[0].sum())] = float("inf")
    x = torch.ones(tokens, 130)
    x[-1] = 2
    y = NativeWeight(values, bits, 130).linear(x, None)
    assert y[:, 0].isinf().all()
    expected = mask[1:].sum(1) * torch.ones(tokens, 1)
    expected[-1] *= 2
    assert torch.equal(y[:, 1:], expected)


@given(seed=st.integers(0, 2**31), tokens=st.sampled_from([1, 3, 8, 40]), dtype=st.sampled_from(DTYPES))
@settings(max_examples=30, deadline=None)
def test_masks_that_lie_are_told(seed, tokens, dtype):
    generator = torch.Generator().manual_seed(seed)
    out, columns = 13, 203
    values = poisoned(torch.ones(int(torch.randint(1, 900, (1,), generator=generator)), dtype=dtype))
    bits = torch.randint(0, 256, (out, -(-columns // 8)), generator=generator, dtype=torch.uint8)
    weight = NativeWeight(values, bits, columns)
    x, grad = torch.ones(tokens, columns, dtype=dtype), torch.ones(tokens, out, dtype=dtype)
    products = (
        lambda: weight.linear(x, None),
        lambda: weight.grad_input(grad),
        lambda: weight.grad_values(grad, x),
        weight.dense,
    )
    for product in products:
        if int(unpack_mask(bits, 8 * bits.shape[1]).sum()) == len(values):
            assert product().isfinite().all()
        else:
            with pytest.raises(ValueError, match="weight_mask"):
                product()


def layer(dtype=torch.bfloat16, pattern="2:4", bias=True, out=24, columns=64) -> SparseLinear:
    torch.manual_seed(0)
    linear = torch.nn.Linear(columns, out, bias=bias).to(dtype)
    return SparseLinear.from_dense(linear, Pattern(pattern).mask(linear.weight.abs()), Pattern(pattern))


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (0, 64), (2, 0, 64)])
@torch.no_grad()
def test_batches_of_any_rank(shape):
    sparse, x = layer(), torch.randn(shape).bfloat16()
    y = sparse(x)
    assert y.shape == (*shape[:-1], 24)
    torch.testing.assert_close(y, F.linear(x, sparse.to_dense_weight(), sparse.bias), rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_input_that_is_not_contiguous():
    sparse, x = layer(torch.float32), torch.randn(64, 5)
    torch.testing.assert_close(sparse(x.T), sparse(x.T.contiguous()))


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_a_weight_that_is_not_contiguous(pattern):
    sparse, grad, x = layer(torch.float32, pattern, out=64), torch.randn(64, 64), torch.randn(64, 64)
    values, bits = sparse.weight.detach(), sparse.weight_mask
    apart = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in (values, bits)]
    assert not any(tensor.is_contiguous() for tensor in apart)
    for _ in range(20):  # memory that was freed too early is overwritten now and then alone
        assert torch.equal(operators.decompress(*apart, 64, pattern), sparse.to_dense_weight())
        torch.testing.assert_close(
            operators.grad_input(grad, *apart, 64, pattern), operators.grad_input(grad, values, bits, 64, pattern)
        )
        torch.testing.assert_close(
            operators.grad_values(grad, x, *apart, pattern), operators.grad_values(grad, x, values, bits, pattern)
        )
        torch.testing.assert_close(
            operators.linear(x, *apart, None, 64, pattern), operators.linear(x, values, bits, None, 64, pattern)
        )
    with pytest.raises(ValueError, match="contiguous"):
        NativeWeight(*apart, 64)


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
@torch.no_grad()
def test_what_is_written_into_a_layer_is_seen(pattern):
    sparse, x = layer(torch.float32, pattern), torch.randn(3, 64)
    before = sparse(x)
    sparse.weight.mul_(2)
    torch.testing.assert_close(sparse(x) - sparse.bias, 2 * (before - sparse.bias))
    sparse.weight_mask.copy_(sparse.weight_mask.roll(1, 0))
    torch.testing.assert_close(sparse(x), F.linear(x, sparse.to_dense_weight(), sparse.bias))
    sparse.weight.data = torch.ones_like(sparse.weight)
    torch.testing.assert_close(sparse(x), F.linear(x, sparse.to_dense_weight(), sparse.bias))
    sparse.double()
    assert sparse(x.double()).dtype == torch.float64


@torch.no_grad()
def test_a_layer_takes_native_code_and_can_be_told_not_to(monkeypatch):
    sparse, x = layer(), torch.randn(1, 64).bfloat16()
    assert choose(sparse.packed(), 1).kernel == "native"
    sparse.kernel = "reference"
    y = sparse(x)
    monkeypatch.setattr(native, "_library", lambda: "broken")
    assert torch.equal(sparse(x), y)
    sparse.kernel = "native"
    with pytest.raises(ValueError, match="broken"):
        sparse(x)


@torch.no_grad()
def test_wrong_input_is_refused_as_by_a_dense_layer():
    sparse = layer()
    with pytest.raises(RuntimeError, match="64"):
        sparse(torch.zeros(1, 63).bfloat16())
    with pytest.raises(RuntimeError, match="float32"):
        sparse(torch.zeros(1, 64))
    sparse.bias.data = sparse.bias.data.float()
    with pytest.raises(RuntimeError, match="bias"):
        sparse(torch.zeros(1, 64).bfloat16())
    with pytest.raises(ValueError, match="bits"):
        NativeWeight(sparse.weight, sparse.weight_mask[:, :-1].contiguous(), 64)


def test_bits_behind_a_row_are_no_columns():
    """Of a mask that was written in memory: the gradient would be gathered from behind the dense rows."""
    bits, values = torch.full((4, 2), 255, dtype=torch.uint8), torch.ones(64)
    with pytest.raises(ValueError, match="weight_mask"):
        NativeWeight(values, bits, 10).grad_values(torch.ones(3, 4), torch.ones(3, 10))


def test_gradients_of_a_layer_are_the_dense_ones(monkeypatch):
    monkeypatch.setattr(native, "_GRADIENT_BYTES", 7 * 64 * 4)  # panels of seven rows
    sparse, x = layer(torch.float32, "50%"), torch.randn(2, 7, 64, requires_grad=True)
    dense = sparse.to_dense_weight().requires_grad_()
    (sparse(x).square().sum()).backward()
    grads = x.grad, sparse.weight.grad, sparse.bias.grad
    x.grad = None
    bias = sparse.bias.detach().clone().requires_grad_()
    F.linear(x, dense, bias).square().sum().backward()
    kept = dense.grad[sparse.to_dense_weight() != 0]
    for gradient, reference in zip(grads, (x.grad, kept, bias.grad), strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("bias", [True, False])
def test_on_a_cpu_with_products_in_16_bit_many_tokens_take_those(monkeypatch, bias):
    for module in (native, operators):
        monkeypatch.setattr(module, "multiplies_in", lambda dtype: dtype is torch.bfloat16)
    for name in ("_PANELS", "_PANELS_BESIDE_TILES"):
        monkeypatch.setattr(native, name, (16, 7 * 64 * 2))
    sparse, x = layer(bias=bias), torch.randn(2, 24, 64).bfloat16().requires_grad_()
    expected = F.linear(x, sparse.to_dense_weight(), sparse.bias)
    with torch.no_grad():
        assert torch.equal(sparse(x), expected)
        torch.testing.assert_close(sparse(x[:1, :1]), expected[:1, :1], rtol=2e-2, atol=2e-2)
    sparse(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(expected) @ sparse.to_dense_weight())


@torch.no_grad()
def test_threads_are_torchs_own_and_two_models_run_at_once():
    sparse, x = layer(torch.float32, out=512, columns=512), torch.randn(40, 512)
    expected, threads = sparse(x), torch.get_num_threads()
    results: list[torch.Tensor] = []

    @torch.no_grad()
    def run() -> None:
        for _ in range(20):
            results.append(sparse(x))

    workers = [threading.Thread(target=run) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 40
    assert all(torch.equal(result, expected) for result in results)
    assert torch.get_num_threads() == threads


def test_starts_of_rows_are_not_those_of_another_mask():
    """A mask that lies where an earlier one did, as in a loop over layers."""
    for seed in range(20):
        mask = torch.rand(64, 512, generator=torch.Generator().manual_seed(seed)) < 0.5
        values, bits = mask.float()[mask], pack_mask(mask)
        torch.testing.assert_close(
            NativeWeight(values, bits, 512).linear(torch.ones(1, 512), None)[0], mask.sum(1).float()
        )
        del values, bits


@pytest.mark.slow
def test_operators_of_torch_compile():
    weight = PackedWeight(*layer().packed()[:2], 64, "2:4")
    x = torch.randn(3, 64).bfloat16()
    grad = torch.randn(3, 24).bfloat16()
    for operator, arguments in (
        (torch.ops.ksparse.grad_input.default, (grad, weight.values, weight.bits, 64, "2:4")),
        (torch.ops.ksparse.grad_values.default, (grad, x, weight.values, weight.bits, "2:4")),
        (torch.ops.ksparse.decompress.default, (weight.values, weight.bits, 64, "2:4")),
    ):
        torch.library.opcheck(operator, arguments)
