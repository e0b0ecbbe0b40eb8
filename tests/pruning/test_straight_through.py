"""Tuned blocks are quantised; packed experts are tuned with the rounding of their values in the loop."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from optimum_ksparse import SparsityConfig, sparsify
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.nn import SparseLinear
from optimum_ksparse.pattern import Pattern
from optimum_ksparse.pruning.layer import _pack
from optimum_ksparse.pruning.straight_through import straight_through
from optimum_ksparse.quantization import LIMITS

from ..nn.test_experts import COMMON
from .test_reconstruction import TOKENS, block_error, make_settings

EVERY = pytest.mark.parametrize("values", sorted(LIMITS))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.fixture
def quantised(make_model):
    """A model whose values are quantised."""

    def make(values, pattern="2:4", dtype=torch.float32):
        model = make_model("llama", dtype)
        sparsify(model, SparsityConfig("magnitude", pattern, values=values, group_size=64))
        return model

    return make


@EVERY
@DTYPES
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_without_a_step_all_stays(quantised, values, dtype, pattern):
    model = quantised(values, pattern, dtype)
    before = state(model)
    with straight_through(model) as layers:
        assert layers and all(module.values is None for module in sparse_modules(model).values())
        for layer in layers:
            layer.round_()
            layer.weight.data = layer.weight.data.to(dtype)
    after = state(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@EVERY
def test_gradients_are_those_of_the_rounding_passed_by(values):
    torch.manual_seed(0)
    linear, pattern = nn.Linear(96, 8), Pattern("50%")
    mask = pattern.mask(linear.weight.detach().abs())
    model = nn.Sequential(SparseLinear.from_dense(linear, mask, pattern))
    block = copy.deepcopy(model)
    config = SparsityConfig("magnitude", "50%", values=values, group_size=64)
    packed, _ = _pack("layer", linear.weight.detach(), linear.weight.detach() * mask, mask, None, config)
    block[0] = SparseLinear.from_packed(linear, packed)
    x = torch.randn(5, 96)
    with straight_through(block) as (layer,):
        layer.learned.data.mul_(1.3)  # some are beyond the greatest integer
        layer.round_()
        block(x).square().sum().backward()
        layer.pass_on_gradient()
        learned, growth = layer.learned.detach().clone(), layer.growth.detach().clone()
        for tensor in (learned, growth):
            tensor.requires_grad_()
        scale = (layer._first * growth).view(-1)[layer._places]
        quotients = learned / scale
        integers = quotients + (quotients.round() - quotients).detach()
        weight = torch.zeros(8, 96).masked_scatter(mask, integers.clamp(*LIMITS[values]) * scale)
        nn.functional.linear(x, weight, linear.bias).square().sum().backward()
        assert float((learned.grad == 0).sum()) > 0
        torch.testing.assert_close(layer.learned.grad, learned.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.growth.grad, growth.grad, rtol=1e-3, atol=1e-3)


@EVERY
@DTYPES
def test_a_tuned_block_is_quantised(make_model, values, dtype):
    dense = make_model("llama", dtype)
    plain, tuned, ordinary = (copy.deepcopy(dense) for _ in range(3))
    sparsify(plain, make_settings(reconstruct=None, method="admm", values=values))
    report = sparsify(tuned, make_settings(method="admm", values=values))
    sparsify(ordinary, make_settings(method="admm"))
    assert block_error(dense, tuned) < block_error(dense, plain)
    if values == "int8":
        assert block_error(dense, tuned) < 1.05 * block_error(dense, ordinary)
    for name, module in sparse_modules(tuned).items():
        assert module.values == values and module.dtype is dtype and not module.weight.requires_grad
        module.check_mask(name)
    sizes = {row.name: row.packed_bytes for row in report.layers}
    assert sizes == {
        name.removeprefix("model."): module.packed_bytes for name, module in sparse_modules(tuned).items()
    }
    assert bool(tuned(TOKENS[:2]).logits.isfinite().all())


def test_what_is_replaced_comes_back_on_an_error(make_model, monkeypatch):
    model = make_model("llama")
    before = state(model)
    calls = []

    def fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr("optimum_ksparse.pruning.block.output_loss", fails)
    with pytest.raises(KeyboardInterrupt):
        sparsify(model, make_settings(values="int4"), restore_on_error=True)
    after = state(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def routed(**settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**COMMON)).eval()
    return model, sparsify(model, make_settings(values="int4", activations="pruned", batch_size=2, **settings))


def test_packed_experts_are_tuned_with_rounding_in_the_loop():
    model, report = routed()
    assert all(row.loss_after <= row.loss_before for row in report.reconstruction)
    assert any(row.loss_after < row.loss_before for row in report.reconstruction)
    for name, module in sparse_modules(model).items():
        assert module.values == "int4"
        module.check_mask(name)


def test_what_diverges_leaves_integers_and_scales_as_they_were():
    plain, _ = routed(reconstruct=None)
    tuned, report = routed(reconstruction_lr=1.0)
    assert all("diverged" in row.note or "no epoch" in row.note for row in report.reconstruction)
    before, after = state(plain), state(tuned)
    assert all(torch.equal(before[name], after[name]) for name in before)
