"""`masked_linear`: the product with a low-rank matrix under a mask, and what merging takes from it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_ksparse import Pattern
from optimum_ksparse.kernels import PackedWeight
from optimum_ksparse.nn import masked, masked_linear, row_norms
from optimum_ksparse.packing import pack, unpack
from optimum_ksparse.quantization import LIMITS, by_column, pack_integers

from ..conftest import thinned

PATTERNS = ("2:4", "4:8", "1:3", "50%", "29%")


@pytest.fixture(autouse=True, params=[1, 64 << 20], ids=["row by row", "at once"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(masked, "_CHUNK_BYTES", request.param)


def make(pattern="2:4", out_features=5, in_features=24, rank=3, dtype=torch.float64, tokens=(2, 3), seed=0):
    """x, A, B, mask bits, packed values, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (*tokens, in_features), (rank, in_features), (out_features, rank), (out_features, in_features)
    x, a, b, weight = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    mask = Pattern(pattern).mask(torch.rand(out_features, in_features, generator=generator))
    values, bits = pack(weight, mask, Pattern(pattern))
    return x, a, b, bits, values, mask


def packed(bits, values=None, in_features=24):
    """What `masked_linear` takes: the packed weight, or the bits of the mask alone."""
    return bits if values is None else PackedWeight(values, bits, in_features, "")


def dense(x, a, b, bits, values, scale, mask):
    weight = mask.to(x.dtype) if values is None else unpack(values, bits, a.shape[1]).to(x.dtype)
    return F.linear(x, weight * (b @ a)) * scale


@pytest.mark.parametrize("pattern", thinned(PATTERNS, ["2:4", "29%"]))
@pytest.mark.parametrize("with_values", [False, True])
def test_gradcheck(pattern, with_values):
    x, a, b, bits, values, mask = make(pattern, out_features=3, rank=2, tokens=(2, 1))
    leaves = [x, a, b, *([values] if with_values else [])]
    for leaf in leaves:
        leaf.requires_grad_()

    def product(x, a, b, values=None):
        return masked_linear(x, a, b, packed(bits, values), 0.7)

    torch.testing.assert_close(product(*leaves), dense(x, a, b, bits, values if with_values else None, 0.7, mask))
    assert torch.autograd.gradcheck(product, leaves)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 1, 3, 24), (0, 24), (2, 0, 24)])
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_inputs_of_any_rank(shape, pattern):
    _, a, b, bits, values, mask = make(pattern)
    x = torch.randn(shape, dtype=torch.float64)
    results = []
    for product in (
        lambda *inputs: masked_linear(*inputs, packed(bits, values)),
        lambda *inputs: dense(*inputs, bits, values, 1.0, mask),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
        y = product(*leaves)
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bit(dtype, autocast):
    x, a, b, bits, _, mask = make("4:8", dtype=torch.float32 if autocast else dtype)
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = masked_linear(*leaves, bits, 2.0)
    assert y.dtype == dtype
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    expected = dense(*exact, bits, None, 2.0, mask)
    torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.1)
    grads, wanted = torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), exact)
    for leaf, grad, want in zip(leaves, grads, wanted, strict=True):
        assert grad.dtype == leaf.dtype
        torch.testing.assert_close(grad.double(), want, rtol=0.05, atol=0.3)


def test_only_what_needs_gradients_gets_them():
    x, a, b, bits, values, _ = make()
    b.requires_grad_()
    masked_linear(x, a, b, packed(bits, values)).sum().backward()
    assert b.grad is not None
    assert (x.grad, a.grad, values.grad) == (None, None, None)


def test_nothing_dense_is_saved():
    """The graph holds the inputs and the mask, whatever the size of the weight."""
    x, a, b, bits, values, _ = make(out_features=40, in_features=48, tokens=(2,))
    saved = []
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        masked_linear(*leaves, packed(bits, values, 48))
    given = {tensor.data_ptr() for tensor in (x, a, b, bits, values)}
    assert {tensor.data_ptr() for tensor in saved} <= given


@pytest.mark.parametrize(
    ("x", "a", "b"), [((2, 23), (3, 24), (5, 3)), ((2, 24), (3, 24), (5, 4)), ((2, 24), (3, 24), (6, 3))]
)
def test_shapes_that_do_not_fit(x, a, b):
    bits = make()[3]
    with pytest.raises(
        RuntimeError, match=r"needed are one dtype, one device and \[\.\.\., in\], \[rank, in\], \[5, rank\]"
    ):
        masked_linear(torch.randn(x), torch.randn(a), torch.randn(b), bits)
    with pytest.raises(RuntimeError, match="A is torch.float64"):
        masked_linear(torch.randn(2, 24), torch.randn(3, 24).double(), torch.randn(5, 3), bits)
    with pytest.raises(RuntimeError, match=r"A is .* on meta"):
        masked_linear(torch.randn(2, 24), torch.randn(3, 24, device="meta"), torch.randn(5, 3), bits)


@pytest.mark.slow
def test_compiles():
    x, a, b, bits, values, mask = make(dtype=torch.float32)
    b.requires_grad_()
    y = torch.compile(masked_linear, backend="aot_eager", fullgraph=True)(x, a, b, packed(bits, values), 2.0)
    torch.testing.assert_close(y, dense(x, a, b, bits, values, 2.0, mask))
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), b), torch.autograd.grad(dense(x, a, b, bits, values, 2.0, mask).sum(), b)
    )


@settings(max_examples=25)
@given(
    pattern=st.sampled_from(PATTERNS),
    out_features=st.integers(1, 7),
    groups=st.integers(1, 3),
    rank=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_row_norms(pattern, out_features, groups, rank, seed):
    _, a, b, bits, values, _ = make(pattern, out_features, 24 * groups, rank, seed=seed)
    weight = unpack(values, bits, a.shape[1])
    torch.testing.assert_close(
        row_norms(packed(bits, values, a.shape[1]), a, b, 0.3), (weight + 0.3 * b @ a).norm(dim=1)
    )


@pytest.mark.parametrize("pattern", ["2:4", "29%"])
@pytest.mark.parametrize("values", ["int8", "int4"])
def test_quantised_values(pattern, values, in_features=144, group_size=64):
    x, a, b, bits, floats, _ = make(pattern, 7, in_features)
    least, greatest = LIMITS[values]
    generator = torch.Generator().manual_seed(1)
    integers = torch.randint(least, greatest + 1, floats.shape, generator=generator).to(torch.int8)
    scale = torch.rand(7, 3, generator=generator, dtype=torch.float64)
    weight = PackedWeight(pack_integers(integers, values), bits, in_features, "", None, scale, group_size)
    exact = unpack(integers.double(), bits, in_features) * by_column(scale, group_size, in_features)
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    results = [masked_linear(*leaves, weight, 0.7), F.linear(x, exact * (b @ a)) * 0.7]
    grads = [torch.autograd.grad(y.sin().sum(), leaves) for y in results]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(row_norms(weight, a, b, 0.3), (exact + 0.3 * b @ a).norm(dim=1).detach())
