"""The native product where its addresses, sizes or inputs are not the usual ones."""

import pytest
import torch
import torch.nn.functional as F

from optimum_ksparse.kernels.cpu import why_not_native
from optimum_ksparse.nn import SparseLinear
from optimum_ksparse.pattern import Pattern

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason=f"no native code here: {why_not_native()}")


def layer(pattern: str = "50%", seed: int = 0) -> SparseLinear:
    generator = torch.Generator().manual_seed(seed)
    mask = Pattern(pattern).mask_of_layer(torch.rand(33, 70, generator=generator))
    return SparseLinear.from_dense(torch.nn.Linear(70, 33), mask, Pattern(pattern))


def dense(sparse: SparseLinear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, sparse.to_dense_weight(), sparse.bias)


@pytest.mark.parametrize("size", [1, 5, 34])
@torch.no_grad()
def test_a_bias_of_another_size_is_refused(size):
    sparse = layer()
    sparse.bias = torch.nn.Parameter(torch.zeros(size))
    with pytest.raises(RuntimeError, match="bias"):
        sparse(torch.zeros(3, 70))


def test_the_default_device_is_not_where_native_code_writes():
    sparse, x = layer(), torch.randn(3, 70)
    with torch.device("meta"), torch.no_grad():
        y = sparse(x)
    torch.testing.assert_close(y, dense(sparse, x))
    fresh = layer()
    y = fresh(x)
    with torch.device("meta"):
        torch.autograd.backward(y, torch.ones_like(y, device="cpu"))
        weight = fresh.to_dense_weight()
    assert fresh.weight.grad.device.type == weight.device.type == "cpu"


@torch.no_grad()
def test_no_input_features_give_the_bias():
    sparse = SparseLinear(0, 4, pattern=Pattern("50%"), num_values=0)
    sparse.bias.fill_(3)
    assert torch.equal(sparse(torch.empty(2, 0)), torch.full((2, 4), 3.0))


@torch.no_grad()
def test_a_layer_cut_in_place_has_its_new_size():
    sparse, x = layer("1:2"), torch.randn(2, 70)
    expected = sparse(x)[:, :5]
    for name in ("weight", "bias"):
        setattr(sparse, name, torch.nn.Parameter(getattr(sparse, name)[:5]))
    sparse.weight_mask, sparse.out_features = sparse.weight_mask[:5], 5
    torch.testing.assert_close(sparse(x), expected)


@torch.inference_mode()
def test_a_mask_of_inference_mode_is_counted_again():
    sparse, other, x = layer(), layer(seed=1), torch.randn(2, 70)
    sparse(x)
    sparse.load_state_dict(other.state_dict())
    torch.testing.assert_close(sparse(x), dense(other, x))


@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_a_mask_that_is_written_behind_autograds_back_is_counted_again(tokens):
    sparse, other = layer(), layer(seed=1)
    x = torch.randn(tokens, 70, requires_grad=True)
    sparse(x).sum().backward()
    sparse.weight.data.copy_(other.weight)
    sparse.weight_mask.data.copy_(other.weight_mask)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), F.linear(x, other.to_dense_weight(), sparse.bias))
    x.grad = sparse.weight.grad = None
    sparse(x).sum().backward()
    torch.testing.assert_close(x.grad, other.to_dense_weight().sum(0).expand(tokens, -1))
    torch.testing.assert_close(sparse.to_dense_weight(), other.to_dense_weight())


@torch.no_grad()
def test_a_weight_of_too_few_values_is_refused():
    sparse, x = layer(), torch.randn(2, 70)
    sparse.weight.data = sparse.weight.data[:-1].clone()
    with pytest.raises(ValueError, match="values"):
        sparse(x)


@torch.no_grad()
def test_views_that_negate_or_are_zero():
    sparse, x = layer(), torch.randn(2, 70)
    torch.testing.assert_close(sparse(torch._neg_view(x)), dense(sparse, -x))
    torch.testing.assert_close(sparse(torch._efficientzerotensor((2, 70))), dense(sparse, torch.zeros(2, 70)))
