"""Sparse modules whose kept values are quantised: they compute, store and load integers and scales."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_ksparse.kernels import PackedWeight
from optimum_ksparse.nn import SparseExperts, SparseLinear
from optimum_ksparse.packing import pack
from optimum_ksparse.pattern import Pattern
from optimum_ksparse.quantization import LIMITS, pack_integers

SHAPE = (6, 132)
EVERY = pytest.mark.parametrize("values", sorted(LIMITS))
PATTERNS = pytest.mark.parametrize("pattern", ["2:4", "1:4", "50%"])


def matrix(values: str, pattern: str = "2:4", dtype: torch.dtype = torch.float32) -> PackedWeight:
    low, high = LIMITS[values]
    mask = Pattern(pattern).mask(torch.rand(SHAPE))
    integers, bits = pack(torch.randint(low, high + 1, SHAPE, dtype=torch.int8), mask, Pattern(pattern))
    scale = torch.rand(SHAPE[0], 3).to(dtype)
    return PackedWeight(pack_integers(integers, values), bits, SHAPE[1], pattern, None, scale, 64)


def layer(values: str, pattern: str = "2:4", dtype: torch.dtype = torch.float32, kind: type = nn.Linear):
    dense = Conv1D(*SHAPE) if kind is Conv1D else nn.Linear(*SHAPE[::-1])
    return SparseLinear.from_packed(dense.to(dtype), matrix(values, pattern, dtype))


def stack(values: str, pattern: str = "2:4"):
    return SparseExperts.from_packed([matrix(values, pattern) for _ in range(3)])


@EVERY
@PATTERNS
@pytest.mark.parametrize("make", [layer, stack])
def test_shape_density_and_bytes(values, pattern, make):
    module = make(values, pattern)
    dense = module.to_dense_weight()
    assert module.shape == dense.shape and module.values == values and module.group_size == 64
    assert int(dense.count_nonzero()) <= module.num_values == round(module.density * dense.numel())
    assert module.density == (0.25 if pattern == "1:4" else 0.5)
    assert module.dtype is torch.float32 and module.dense_bytes == 4 * dense.numel()
    of_values = module.num_values
    if values == "int4":  # two a byte, in a row of n:m as in the values of any other matrix
        rows = dense[..., 0].numel() if module.pattern.is_semi_structured else 3 if make is stack else 1
        of_values = rows * -(-module.num_values // rows // 2)
    assert module.packed_bytes == of_values + module.weight_mask.nbytes + module.weight_scale.nbytes
    assert f"values={values}" in repr(module) and not module.weight.requires_grad


@EVERY
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_layer_is_the_dense_one_that_it_stands_for(values, kind):
    module, x = layer(values, "50%", kind=kind), torch.randn(2, 3, SHAPE[1])
    dense = module.to_dense()
    assert type(dense) is kind and dense.weight.requires_grad
    torch.testing.assert_close(module(x), dense(x), rtol=1e-4, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype is torch.bfloat16


@EVERY
@PATTERNS
def test_experts_are_the_dense_matrices_that_they_stand_for(values, pattern):
    module, x = stack(values, pattern), torch.randn(2, SHAPE[1], requires_grad=True)
    dense = module.to_dense()
    for expert in range(3):
        torch.testing.assert_close(nn.functional.linear(x, module[expert]), x @ dense[expert].T, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(x @ module[expert].T, x @ dense[expert].T)
    nn.functional.linear(x, module[0]).sum().backward()
    torch.testing.assert_close(x.grad, dense[0].sum(0).expand_as(x), rtol=1e-4, atol=1e-3)
    module.check_mask("experts")


@EVERY
@pytest.mark.parametrize("make", [layer, stack])
def test_copies_pickles_and_state_dicts_are_the_same(values, make):
    module, file = make(values), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    other = make(values)
    other.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False), other):
        assert torch.equal(twin.to_dense_weight(), module.to_dense_weight())
        assert (twin.values, twin.group_size, twin.num_values) == (values, 64, module.num_values)


@EVERY
def test_another_dtype_is_that_of_the_scale(values):
    module = layer(values).to(torch.bfloat16)
    assert module.weight.dtype is layer(values).weight.dtype and module.weight_scale.dtype is torch.bfloat16
    assert module(torch.randn(1, SHAPE[1]).bfloat16()).dtype is torch.bfloat16


@EVERY
@PATTERNS
@pytest.mark.parametrize("make", [layer, stack])
def test_dequantized_values_train(values, pattern, make):
    module = make(values, pattern)
    dense = module.to_dense_weight()
    parent = nn.ModuleDict({"norm": nn.LayerNorm(4), "up": module}).requires_grad_(False)
    with pytest.raises(ValueError, match=rf"^up .*{values}.*dequantize_values"):
        parent.requires_grad_(True)
    assert not any(parameter.requires_grad for parameter in parent.parameters())
    with pytest.raises(ValueError, match="dequantize_values"):
        module.requires_grad_(True)
    module.dequantize_values()
    module.dequantize_values()
    assert parent.requires_grad_(True) is parent and module.weight.requires_grad
    assert torch.equal(module.to_dense_weight(), dense) and module.values is None and module.dtype is torch.float32
    assert set(module.state_dict()) <= {"weight", "weight_mask", "bias"}
    matrix = module[0] if isinstance(module, SparseExperts) else module.weight
    out = nn.functional.linear(torch.ones(1, SHAPE[1]), matrix) if make is stack else module(torch.ones(1, SHAPE[1]))
    out.sum().backward()
    assert module.weight.grad.count_nonzero()


@EVERY
def test_a_dense_state_dict_is_taken_where_it_is_integers_times_the_scales(values):
    module = layer(values, "50%", torch.bfloat16)
    dense = {"weight": module.to_dense_weight(), "bias": module.bias}
    other = copy.deepcopy(module)
    other.weight.data.zero_()
    other.load_state_dict(dense, strict=False)
    assert torch.equal(other.to_dense_weight(), module.to_dense_weight())
    with pytest.raises(RuntimeError, match="scales"):
        other.load_state_dict({**dense, "weight": dense["weight"] * 1.5}, strict=False)


@pytest.mark.parametrize("make", [layer, stack])
@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("weight_scale", lambda t: t.fill_(float("nan"))),
        ("weight_scale", lambda t: t.fill_(float("inf"))),
        ("weight_scale", lambda t: t.neg_()),
        ("weight", lambda t: t.fill_(-128)),
        ("weight", lambda t: t.float()),
        ("weight", lambda t: t.view(torch.uint8)),
        ("weight_scale", lambda t: t[..., :1]),
    ],
)
def test_a_state_dict_that_cannot_be_right_is_refused(make, name, spoil):
    module = make("int8")
    state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    state[name] = spoil(state[name])
    with pytest.raises(RuntimeError, match=name):
        module.load_state_dict(state)
    ordinary = make("int8")
    ordinary.dequantize_values()
    with pytest.raises(RuntimeError, match="int8"):
        ordinary.load_state_dict(module.state_dict(), strict=False)


@pytest.mark.parametrize("spoil", ["weight_scale", "weight"])
def test_tensors_that_were_read_are_checked(spoil):
    module = layer("int8")
    module.check_mask("up")
    getattr(module, spoil).data.flatten()[-1] = -128
    with pytest.raises(ValueError, match=f"up.{spoil}"):
        module.check_mask("up")


def test_scales_of_zero_are_exact_zeros():
    module = layer("int4")
    module.weight_scale[0] = 0
    assert not module.to_dense_weight()[0].any() and module.to_dense_weight()[1].any()


@pytest.mark.parametrize(("setting", "kind"), [({"values": "int3"}, ValueError), ({"group_size": 32}, ValueError)])
def test_settings_that_cannot_be(setting, kind):
    with pytest.raises(kind, match=next(iter(setting))):
        SparseLinear(64, 4, pattern=Pattern("2:4"), **{"values": "int8", **setting})
