"""PEFT on sparse models: it computes as on the dense model with its zeros, and merging keeps every zero."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from optimum_ksparse import Pattern
from optimum_ksparse.checkpoint import sparse_modules

from .models import METHODS, adapted, logits, same, state, trained, wrapped

peft = pytest.importorskip("peft", reason="needs the extra finetune")
utils = pytest.importorskip("peft.utils")


# --- What layers compute ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name", "pattern"),
    [
        ("lora", "llama", "2:4"),
        ("rslora", "gpt2", "4:8"),
        ("dora", "gpt_neox", "50%"),
        ("hira", "gpt2", "4:8"),
    ],
)
def test_forward_and_gradients_equal_those_of_the_dense_model(make_pruned, token_ids, method, name, pattern):
    sparse = adapted(make_pruned(name, pattern), method, name)
    dense = peft.get_peft_model(make_pruned(name, pattern).dequantize(), copy.deepcopy(sparse.peft_config["default"]))
    utils.set_peft_model_state_dict(dense, utils.get_peft_model_state_dict(sparse))
    losses = [model(token_ids, labels=token_ids) for model in (sparse, dense)]
    torch.testing.assert_close(losses[0].logits, losses[1].logits, rtol=1e-4, atol=1e-5)
    for loss in losses:
        loss.loss.backward()
    assert len(trained(sparse)) > 4
    torch.testing.assert_close(trained(sparse), trained(dense), rtol=1e-3, atol=1e-6)


def test_dropout_of_dora_equals_the_dense_one(make_pruned, token_ids):
    """Then PEFT computes the base layer's output again, without the bias."""
    sparse = adapted(make_pruned("gpt_neox"), "dora", "gpt_neox", lora_dropout=0.5).train()
    config = copy.deepcopy(sparse.peft_config["default"])
    dense = peft.get_peft_model(make_pruned("gpt_neox").dequantize(), config).train()
    utils.set_peft_model_state_dict(dense, utils.get_peft_model_state_dict(sparse))
    outputs = []
    for model in (sparse, dense):
        torch.manual_seed(1)
        outputs.append(logits(model, token_ids))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_no_warning_about_the_layout_of_the_weight(make_pruned, method, name="gpt2"):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fan_in_fan_out.*")
        model = adapted(make_pruned(name), method, name)
    assert all(not layer.fan_in_fan_out for layer in wrapped(model))
    layer = wrapped(model)[0]
    assert layer.get_delta_weight("default").shape == (layer.out_features, layer.in_features)


@pytest.mark.parametrize("method", METHODS)
def test_effective_weight_is_what_the_layer_computes_with(make_pruned, method):
    model = adapted(make_pruned("gpt2", "50%"), method, "gpt2")
    model = adapted(model, method, "gpt2", seed=1, adapter="other")
    model.base_model.set_adapter(["default", "other"])
    for layer in wrapped(model):
        x = torch.randn(3, layer.in_features)
        expected = layer(x)
        weight = layer.effective_weight()
        assert (weight.shape, weight.dtype) == ((layer.out_features, layer.in_features), torch.float32)
        found = torch.nn.functional.linear(x, weight, layer.get_base_layer().bias)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        layer.merge()
        torch.testing.assert_close(layer.effective_weight(["default", "other"]), weight)
        zero = layer.get_base_layer().to_dense_weight() == 0
        assert torch.equal(layer.effective_weight([]) == 0, zero)


@pytest.mark.slow
def test_bfloat16_and_autocast(make_pruned, token_ids):
    for method in ("dora", "masked", "hira"):
        reference = logits(adapted(make_pruned(), method), token_ids)
        half = adapted(make_pruned(dtype=torch.bfloat16), method)
        assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
        torch.testing.assert_close(logits(half, token_ids).float(), reference, rtol=0.1, atol=0.1)
        full = adapted(make_pruned(), method)
        with torch.autocast("cpu", torch.bfloat16):
            output = full(token_ids, labels=token_ids)
        output.loss.backward()
        torch.testing.assert_close(output.logits.float(), reference, rtol=0.1, atol=0.1)
        assert all(bool(p.grad.isfinite().all()) for p in full.parameters() if p.requires_grad)


def test_mixed_batches(make_pruned, token_ids):
    model = adapted(make_pruned(), "lora")
    model = adapted(model, "masked", seed=1, adapter="masked").eval()
    expected = []
    for adapter in ("default", "masked"):
        model.set_adapter(adapter)
        expected.append(logits(model, token_ids[:1]))
    with model.disable_adapter():
        expected.append(logits(model, token_ids[:1]))
    with torch.no_grad():
        mixed = model(token_ids[:1].repeat(3, 1), adapter_names=["default", "masked", "__base__"]).logits
    torch.testing.assert_close(mixed, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_layers_survive_pickling_and_copying(make_pruned, token_ids):
    for method in ("dora", "hira"):
        model = adapted(make_pruned("llama", "50%"), method)
        expected = logits(model, token_ids)
        assert torch.equal(logits(copy.deepcopy(model), token_ids), expected)
        model.merge_adapter()
        again = copy.deepcopy(model)
        again.unmerge_adapter()
        assert torch.equal(logits(again, token_ids), expected)


# --- Merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name", "pattern"),
    [
        ("rslora", "llama", "50%"),
        ("dora", "gpt_neox", "4:8"),
        ("masked", "gpt2", "50%"),
        ("hira", "gpt2", "4:8"),
        ("hira", "llama", "50%"),
    ],
)
def test_merging_keeps_every_zero(make_pruned, token_ids, method, name, pattern):
    safe_merge = pattern == "50%"
    model = adapted(make_pruned(name, pattern), method, name)
    before, expected = state(model), logits(model, token_ids)
    effective = [layer.effective_weight() for layer in wrapped(model)]
    model.merge_adapter(safe_merge=safe_merge)
    after = state(model)
    assert all(torch.equal(bits, own) for (_, bits), (_, own) in zip(before, after, strict=True))
    for layer, weight in zip(wrapped(model), effective, strict=True):
        base = layer.get_base_layer()
        mask = base.to_dense_weight() != 0
        assert base.density == 0.5
        assert not bool(base.to_dense_weight()[~mask].any())
        torch.testing.assert_close(base.to_dense_weight(), weight * mask, rtol=1e-5, atol=1e-6)
    if method in ("masked", "hira"):
        torch.testing.assert_close(logits(model, token_ids), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert same(state(model), before)
    assert torch.equal(logits(model, token_ids), expected)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert same(state(merged), after)
    assert not any("lora" in key or "hira" in key for key in merged.state_dict())
    for layer in sparse_modules(merged).values():
        Pattern(pattern).verify(layer.to_dense_weight())


@pytest.mark.parametrize(("method", "warns"), [("lora", True), ("dora", True), ("masked", False), ("hira", False)])
def test_what_pefts_merging_throws_away_is_said_once(make_pruned, method, warns):
    model = adapted(make_pruned(), method)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        model.merge_adapter()
        model.unload()  # merged already: nothing more is lost
    assert sum("solve" in str(warning.message) for warning in caught) == warns


@pytest.mark.parametrize("method", METHODS)
def test_several_merged_adapters(make_pruned, token_ids, method):
    model = adapted(adapted(make_pruned(), method), method, seed=1, adapter="other").eval()
    model.base_model.set_adapter(["default", "other"])
    before, expected = state(model), logits(model, token_ids)
    model.merge_adapter(["other"])
    with pytest.warns(UserWarning, match="merged other"):
        model.merge_adapter(["default"])
    one_by_one = state(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter(["default"])
    assert same(state(model), one_by_one)
    if method in ("masked", "hira"):
        torch.testing.assert_close(logits(model, token_ids), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert same(state(model), before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    model.merge_adapter()
    for (values, _), (other, _) in zip(state(model), one_by_one, strict=True):
        if method != "dora":  # whose adapters are not a sum: their order counts, as in the forward pass
            torch.testing.assert_close(values, other)
    with model.disable_adapter():  # PEFT unmerges for it
        logits(model, token_ids)
    assert same(state(model), before)


@pytest.mark.parametrize("method", ["lora", "masked"])
def test_lora_bias(make_pruned, token_ids, method):
    model = adapted(make_pruned("gpt_neox"), method, "gpt_neox", lora_bias=True)
    bias = wrapped(model)[0].get_base_layer().bias.detach().clone()
    lora = wrapped(model)[0].lora_B["default"].bias.detach()
    expected = logits(model, token_ids)
    model.merge_adapter()
    layer = wrapped(model)[0]
    torch.testing.assert_close(layer.get_base_layer().bias, bias + lora * layer.scaling["default"])
    if method == "masked":
        torch.testing.assert_close(logits(model, token_ids), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().bias, bias)
    with pytest.warns(UserWarning, match="merging LoRA weights won't be possible"):
        model = adapted(make_pruned(), method, lora_bias=True)
    before = state(model)
    with pytest.raises(RuntimeError, match="'default' has a bias .* the base layer has none"):
        model.merge_adapter()
    assert same(state(model), before)


@pytest.mark.parametrize("method", ["dora", "hira"])
def test_safe_merge_changes_nothing_where_a_value_is_not_finite(make_pruned, method):
    model = adapted(make_pruned(), method)
    factors = [p for n, p in model.named_parameters() if n.endswith(("lora_B.default.weight", "hira_B.default"))]
    factors[0].data[0, 0] = float("inf")
    before = state(model)
    with pytest.raises(ValueError, match="not finite: an adapter of default is broken"):
        model.merge_adapter(safe_merge=True)
    assert same(state(model), before)
    assert not any(layer.merged for layer in wrapped(model))


def test_merging_offloaded_weights(make_pruned, token_ids):
    from accelerate import cpu_offload

    for method in ("masked", "hira", "dora"):
        plain = adapted(make_pruned(), method)
        model = cpu_offload(adapted(make_pruned(), method), "cpu")
        assert wrapped(model)[0].get_base_layer().weight.is_meta
        torch.testing.assert_close(logits(model, token_ids), logits(plain, token_ids), rtol=1e-5, atol=1e-6)
        for each in (model, plain):
            each.merge_adapter()
        torch.testing.assert_close(logits(model, token_ids), logits(plain, token_ids), rtol=1e-5, atol=1e-6)
        for each in (model, plain):
            each.unmerge_adapter()
        torch.testing.assert_close(logits(model, token_ids), logits(plain, token_ids), rtol=1e-5, atol=1e-6)
        for offloaded, layer in zip(wrapped(model), wrapped(plain), strict=True):
            torch.testing.assert_close(offloaded.effective_weight(), layer.effective_weight())


def test_weighted_adapters(make_pruned, token_ids):
    model = adapted(adapted(make_pruned(), "masked"), "masked", seed=1, adapter="other").eval()
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", combination_type="cat")
    assert wrapped(model)[0].is_masked("both")
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model, token_ids)
    model.set_adapter("both")
    torch.testing.assert_close(logits(model, token_ids), expected, rtol=1e-4, atol=1e-5)
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "svd", combination_type="svd", svd_rank=8)
    model.delete_adapter("default")
    assert not wrapped(model)[0].is_masked("default")
