"""PEFT on sparse models whose kept values are integers: what is trained, saved, merged and refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from optimum_ksparse import merge_adapter
from optimum_ksparse.adapters import MergedLayer, blocks, prepare_for_training
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.commands import parse_words
from optimum_ksparse.packing import unpack_mask

from .models import METHODS, adapted, logits, trained, wrapped
from .test_merge import IDS, randomise
from .test_sparse_training import train

peft = pytest.importorskip("peft", reason="needs the extra finetune")
utils = pytest.importorskip("peft.utils")


@pytest.fixture
def quantised(make_pruned):
    """Makes a sparse model with quantised values, as `make_pruned` does others."""

    def make(values="int8", name="llama", pattern="2:4", dtype=torch.float32):
        return make_pruned(name, pattern, dtype, values=values, group_size=64)

    return make


def state(model):
    """Integers, masks and scales of all sparse layers."""
    layers = sparse_modules(model).values()
    return [tensor.clone() for layer in layers for tensor in (layer.weight, layer.weight_mask, layer.weight_scale)]


def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# --- Training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name", "pattern", "values"),
    [
        ("lora", "llama", "2:4", "int4"),
        ("dora", "gpt_neox", "50%", "int8"),
        ("dora", "gpt2", "4:8", "int4"),
        ("masked", "llama", "50%", "int4"),
        ("hira", "gpt2", "4:8", "int8"),
        ("hira", "llama", "50%", "int4"),
    ],
)
def test_outputs_and_gradients_are_those_on_ordinary_values(quantised, token_ids, method, name, pattern, values):
    integers = adapted(quantised(values, name, pattern), method, name)
    ordinary = quantised(values, name, pattern).dequantize_values()
    ordinary = peft.get_peft_model(ordinary, copy.deepcopy(integers.peft_config["default"]))
    utils.set_peft_model_state_dict(ordinary, utils.get_peft_model_state_dict(integers))
    embeddings, losses = [], []
    for model in (integers, ordinary):
        embedded = model.get_input_embeddings()(token_ids).detach().requires_grad_()
        loss = model(inputs_embeds=embedded, labels=token_ids)
        loss.loss.backward()
        embeddings.append(embedded.grad)
        losses.append(loss.logits)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*embeddings, rtol=1e-3, atol=1e-6)
    assert len(trained(integers)) > 4
    torch.testing.assert_close(trained(integers), trained(ordinary), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_have_the_dtype_of_the_products(quantised, token_ids, method):
    model = quantised("int4", dtype=torch.bfloat16)
    config = METHODS[method](target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.bfloat16}
    model(token_ids, labels=token_ids).loss.backward()
    assert all(grad.isfinite().all() for grad in trained(model).values())


@pytest.mark.parametrize(
    ("method", "values", "settings"),
    [
        ("lora", "int8", {"bf16": True, "gradient_checkpointing": True}),
        ("dora", "int4", {"bf16": True}),
        ("masked", "int4", {"gradient_checkpointing": True}),
        ("hira", "int8", {"bf16": True}),
    ],
)
def test_trainer_trains_adapters_on_a_loaded_base(quantised, token_ids, tmp_path, method, values, settings):
    quantised(values, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = adapted(prepare_for_training(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), method)
    before, adapter = state(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = train(model, token_ids, tmp_path / "run", **settings)
    assert all(entry["loss"] < 1e3 for entry in trainer.state.log_history if "loss" in entry)
    assert same(state(model), before)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, adapter[name])}
    assert moved == set(trained(model))
    trainer.save_model(str(tmp_path / "adapter"))
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert same(state(again), before)
    torch.testing.assert_close(utils.get_peft_model_state_dict(again), utils.get_peft_model_state_dict(model))


def test_training_resumes(quantised, token_ids, tmp_path):
    straight = adapted(quantised("int4"), "masked")
    train(straight, token_ids, tmp_path, 4, save_strategy="steps", save_steps=2)
    resumed = adapted(quantised("int4"), "masked", seed=7)
    train(resumed, token_ids, tmp_path, 4, resume=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(logits(resumed.eval(), token_ids), logits(straight.eval(), token_ids))


@pytest.mark.parametrize("loaded", [False, True])
def test_integers_are_not_trained(quantised, tmp_path, loaded):
    """Which is said before anything is done."""
    model = quantised()
    if loaded:
        model.save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    arguments = TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True)
    named = r"layers\.0\.self_attn\.q_proj.* int8.*dequantize_values\(\)"
    with pytest.raises(ValueError, match=named):
        Trainer(model, arguments)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=named):
        Trainer(args=arguments, model_init=lambda: model)
    config = peft.LoraConfig(target_modules=["up_proj"], modules_to_save=["q_proj"])
    with pytest.raises(ValueError, match=named):
        peft.get_peft_model(model, config)
    for holder in (model, peft.get_peft_model(model, METHODS["lora"]())):
        with pytest.raises(ValueError, match=named):
            holder.requires_grad_(True)


def test_a_variant_that_makes_tensors_like_the_weight_is_refused(quantised):
    velora = peft.tuners.lora.config.VeloraConfig(num_groups=4)
    config = peft.LoraConfig(target_modules=["q_proj"], velora_config=velora)
    with pytest.raises(ValueError, match=r"velora_config.*q_proj.*int8.*dequantize_values"):
        peft.get_peft_model(quantised(), config)


# --- Merging as PEFT does it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "pattern", "values"),
    [("lora", "50%", "int8"), ("dora", "2:4", "int8"), ("masked", "2:4", "int4"), ("hira", "50%", "int4")],
)
def test_merging_rounds_again_and_keeps_every_zero(quantised, token_ids, method, pattern, values):
    model = adapted(quantised(values, pattern=pattern), method)
    before, expected = state(model), logits(model, token_ids)
    effective = [layer.effective_weight() for layer in wrapped(model)]
    bases = [layer.get_base_layer() for layer in wrapped(model)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter(safe_merge=True)
    bound = {"int8": 0.01, "int4": 0.15}[values]
    for base, weight in zip(bases, effective, strict=True):
        kept = torch.where(unpack_mask(base.weight_mask, base.in_features), weight, 0)
        assert base.values == values and base.weight_scale.dtype is torch.float32
        assert (base.to_dense_weight() - kept).norm() < bound * kept.norm()
        assert not base.to_dense_weight()[kept == 0].any()
    model.unmerge_adapter()
    assert same(state(model), before) and torch.equal(logits(model, token_ids), expected)


def test_merging_offloaded_integers(quantised, token_ids):
    from accelerate import cpu_offload

    for method in ("masked", "hira", "dora"):
        plain = adapted(quantised("int4"), method)
        model = cpu_offload(adapted(quantised("int4"), method), "cpu")
        assert wrapped(model)[0].get_base_layer().weight.is_meta
        for change in ("merge_adapter", "unmerge_adapter"):
            torch.testing.assert_close(logits(model, token_ids), logits(plain, token_ids), rtol=1e-5, atol=1e-6)
            getattr(model, change)(), getattr(plain, change)()
        torch.testing.assert_close(logits(model, token_ids), logits(plain, token_ids), rtol=1e-5, atol=1e-6)


def test_a_broken_adapter_changes_no_integers(quantised):
    model = adapted(quantised(), "hira")
    next(p for n, p in model.named_parameters() if n.endswith("hira_B.default")).data[0, 0] = float("inf")
    before = state(model)
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert same(state(model), before)


@pytest.mark.parametrize("merged", [False, True])
def test_values_are_dequantised_under_an_adapter(quantised, token_ids, merged):
    model = adapted(quantised(), "masked")
    expected = logits(model, token_ids)
    if merged:
        model.merge_adapter()
    model.get_base_model().dequantize_values()
    if merged:
        model.unmerge_adapter()
    torch.testing.assert_close(logits(model, token_ids), expected)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, token_ids), expected, rtol=1e-4, atol=1e-5)
    assert model.get_base_model().config.quantization_config.values is None


# --- `merge_adapter` -------------------------------------------------------------------------------------------------


@pytest.fixture
def merged(quantised):
    """Merges a random adapter into a model with quantised values; the model, and how far its logits are off."""

    def make(values, pattern, method, config=None, dataset=IDS):
        model = quantised(values, pattern=pattern)
        config = peft.LoraConfig(r=4, target_modules="all-linear") if config is None else config
        model = randomise(peft.get_peft_model(model, config))
        masks, expected = [mask.clone() for mask in state(model)[1::3]], logits(model, IDS)
        model = merge_adapter(model, method=method, dataset=dataset, batch_size=7)
        assert same(state(model)[1::3], masks)
        assert {layer.values for layer in sparse_modules(model).values()} == {values}
        return model, float((logits(model, IDS) - expected).norm() / expected.norm())

    return make


@pytest.mark.parametrize(("values", "pattern"), [("int8", "50%"), ("int4", "2:4")])
def test_solving_rounds_for_the_outputs(merged, values, pattern, tmp_path):
    (masked, far), (solved, near) = (merged(values, pattern, method) for method in ("masked", "solve"))
    assert near < far
    for one, other in zip(masked.ksparse.merge.layers, solved.ksparse.merge.layers, strict=True):
        assert (one.how, other.how) == ("masked", "solved")
        assert other.relative_output_error < one.relative_output_error
        assert other.unrounded_output_error < one.unrounded_output_error
        assert other.unrounded_output_error < 1.001 * other.relative_output_error
        assert one.rounding > 0 and other.rounding > 0
    assert "rounding" in str(solved.ksparse.merge)
    solved.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(state(again), state(solved)) and again.ksparse.merge == solved.ksparse.merge
    assert torch.equal(logits(again, IDS), logits(solved, IDS))


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_what_is_exact_but_for_rounding_is_rounded_for_the_outputs_too(merged, values):
    config = peft.HiraConfig(r=4, target_modules="all-linear")
    (masked, far), (solved, near) = (merged(values, "2:4", method, config) for method in ("masked", "solve"))
    assert near < far
    for one, other in zip(masked.ksparse.merge.layers, solved.ksparse.merge.layers, strict=True):
        assert (one.how, other.how) == ("exact", "exact") and other.discarded == 0
    assert "exact but for rounding" in str(solved.ksparse.merge)
    errors = [sum(row.relative_output_error for row in model.ksparse.merge.layers) for model in (masked, solved)]
    assert errors[1] < errors[0]


def test_without_data_it_is_said_how_much_rounding_changes(merged):
    model, _ = merged("int4", "2:4", "masked", dataset=None)
    for row in model.ksparse.merge.layers:
        assert row.rounding > 0 and (row.relative_output_error, row.unrounded_output_error) == (None, None)
    assert "rounding" in str(model.ksparse.merge)


def test_an_interrupted_merge_puts_integers_and_scales_back(quantised, monkeypatch):
    model = randomise(peft.get_peft_model(quantised("int4"), peft.LoraConfig(target_modules=["up_proj", "q_proj"])))
    before, calls = state(model), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return MergedLayer(*args, **kwargs)

    monkeypatch.setattr(blocks, "MergedLayer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(model, method="solve", dataset=IDS)
    assert len(calls) == 3 and same(state(model), before)


@pytest.mark.slow
def test_the_command_merges_into_a_quantised_checkpoint(quantised, tmp_path):
    quantised("int8").save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), METHODS["masked"](target_modules=["q_proj"])
    )
    randomise(model).save_pretrained(tmp_path / "adapter")
    words = ["merge", tmp_path / "adapter", tmp_path / "merged", "--base", tmp_path / "base"]
    assert not parse_words([str(word) for word in words]).run()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert same(state(again), state(merge_adapter(model)))
