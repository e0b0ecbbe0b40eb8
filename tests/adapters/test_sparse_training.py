"""Training sparse models: adapters with transformers' `Trainer` and TRL's `SFTTrainer`, and the packed weights."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from optimum_ksparse import SparsityConfig, sparsify
from optimum_ksparse.adapters import prepare_for_training
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.nn import SparseLinear
from optimum_ksparse.pattern import Pattern

from .models import FAMILIES, METHODS, adapted, logits, same, state, trained, wrapped

peft = pytest.importorskip("peft", reason="needs the extra finetune")


def train(model, token_ids, folder, steps=3, resume=None, **settings):
    """A short run; what the trainer holds afterwards."""
    settings = {"learning_rate": 1e-2, "save_strategy": "no", "per_device_train_batch_size": 2, **settings}
    arguments = TrainingArguments(
        str(folder), max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, **settings
    )
    data = [{"input_ids": ids, "labels": ids} for ids in token_ids]
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# --- Before training -------------------------------------------------------------------------------------------------


def test_prepare_for_training(make_pruned, token_ids, name="gpt2"):
    model = make_pruned(name, dtype=torch.bfloat16)
    assert prepare_for_training(model) is model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.use_cache is True  # as it is saved
    assert model.is_gradient_checkpointing
    assert model.get_input_embeddings()(token_ids).requires_grad
    model = adapted(model, "masked", name).train()
    model(token_ids, labels=token_ids).loss.backward()
    assert all(bool(grad.any()) for grad in trained(model).values())


def test_what_an_adapter_wraps_is_not_pruned(make_model, make_pruned, token_ids):
    wanted = SparsityConfig("magnitude", "2:4", dataset=token_ids)
    inside = adapted(make_model(), "lora")
    with pytest.raises(ValueError, match="carries an adapter"):
        sparsify(inside.get_base_model(), wanted)
    with pytest.raises(ValueError, match="carries an adapter"):
        sparsify(adapted(make_pruned(), "lora").get_base_model(), SparsityConfig("existing", values="int8"))
    merged = inside.merge_and_unload()
    sparsify(merged, wanted)
    assert sparse_modules(merged)


def test_what_cannot_be_prepared(make_pruned):
    model = make_pruned()
    with pytest.raises(TypeError, match="model must be a model of transformers, found PeftModelForCausalLM"):
        prepare_for_training(adapted(make_pruned(), "lora"))
    with pytest.raises(TypeError, match="found str"):
        prepare_for_training("gpt2")
    model.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match="pass gradient_checkpointing=False"):
        prepare_for_training(model)
    assert not prepare_for_training(model, gradient_checkpointing=False).is_gradient_checkpointing
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has adapters already"):
        prepare_for_training(model)


# --- Adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "dtype", "settings"),
    [
        ("dora", torch.bfloat16, {"bf16": True, "gradient_checkpointing": True}),
        ("masked", torch.bfloat16, {"gradient_checkpointing": True}),
        ("hira", torch.float32, {"bf16": True}),
    ],
)
def test_trainer_trains_adapters(make_pruned, token_ids, tmp_path, method, dtype, settings):
    model = make_pruned("llama", "50%", dtype)
    if "gradient_checkpointing" in settings:
        model = prepare_for_training(model)
    model = adapted(model, method)
    before, adapter = state(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = train(model, token_ids, tmp_path, **settings)
    assert model.config.use_cache is True  # as it is saved with what is merged
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert same(state(model), before)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, adapter[name])}
    assert moved == set(trained(model))


def test_gradient_checkpointing_changes_no_gradient(make_pruned, token_ids):
    for method in ("dora", "masked", "hira"):
        plain = adapted(make_pruned(), method).train()
        again = adapted(prepare_for_training(make_pruned()), method).train()
        for model in (plain, again):
            model(token_ids, labels=token_ids).loss.backward()
        torch.testing.assert_close(trained(again), trained(plain))


def test_trainer_resumes_with_an_adapter(make_pruned, token_ids, tmp_path):
    straight = adapted(make_pruned(), "masked")
    train(straight, token_ids, tmp_path, 4, save_strategy="steps", save_steps=2)
    resumed = adapted(make_pruned(), "masked", seed=7)
    train(resumed, token_ids, tmp_path, 4, resume=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(logits(resumed.eval(), token_ids), logits(straight.eval(), token_ids))


def test_sft_trainer(make_pruned, tokenizer, tmp_path):
    trl = pytest.importorskip("trl", reason="needs the extra dev")
    datasets = pytest.importorskip("datasets")
    make_pruned(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    config = METHODS["masked"](target_modules=FAMILIES["llama"], task_type="CAUSAL_LM")
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, max_length=32, bf16=True
    )
    data = datasets.Dataset.from_dict({"text": ["대한민국의 수도는 서울이다."] * 8})
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=config,
    )
    before = state(trainer.model)
    trainer.train()
    assert same(state(trainer.model), before)
    layers = wrapped(trainer.model)
    assert layers
    assert all(layer.is_masked("default") and layer.lora_B["default"].weight.any() for layer in layers)
    trainer.save_model(str(tmp_path / "adapter"))
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert all(layer.is_masked("default") for layer in wrapped(again))


# --- The packed weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "pattern"), [("gpt_neox", "4:8"), ("gpt2", "50%")])
def test_full_training_keeps_the_masks(make_pruned, token_ids, tmp_path, name, pattern):
    model = make_pruned(name, pattern)
    before, density = state(model), [layer.density for layer in sparse_modules(model).values()]
    trainer = train(model, token_ids, tmp_path, 5, weight_decay=0.1)
    for (values, bits), (old, kept) in zip(state(model), before, strict=True):
        assert torch.equal(bits, kept)
        assert not torch.equal(values, old)
    assert [layer.density for layer in sparse_modules(model).values()] == density == [0.5] * len(density)
    for layer in sparse_modules(model).values():
        layer.pattern.verify(layer.to_dense_weight())
        moments = trainer.optimizer.state[layer.weight]
        assert (
            moments["exp_avg"].numel() == moments["exp_avg_sq"].numel() == layer.in_features * layer.out_features // 2
        )


def test_full_training_by_another_optimizer(make_pruned, token_ids, tmp_path):
    model = make_pruned(dtype=torch.bfloat16)
    before = state(model)
    train(model, token_ids, tmp_path, weight_decay=0.1, optim="adafactor", bf16=True, gradient_checkpointing=True)
    for (values, bits), (old, kept) in zip(state(model), before, strict=True):
        assert torch.equal(bits, kept)
        assert not torch.equal(values, old)


def test_full_training_equals_that_of_the_dense_model_under_its_mask(make_pruned, token_ids):
    """One step of AdamW: a dense weight whose gradient is masked moves as the packed one does."""
    sparse = make_pruned()
    dense = copy.deepcopy(sparse).dequantize()
    masks = {name: layer.to_dense_weight() != 0 for name, layer in sparse_modules(sparse).items()}
    for model in (sparse, dense):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        model(token_ids, labels=token_ids).loss.backward()
        if model is dense:
            for name, mask in masks.items():
                dense.get_submodule(name).weight.grad *= mask
        optimizer.step()
    assert any(isinstance(module, SparseLinear) for module in sparse.modules())
    torch.testing.assert_close(logits(sparse, token_ids), logits(dense, token_ids), rtol=1e-4, atol=1e-5)


def test_the_output_may_be_changed_in_place():
    """As Falcon does, which adds the output of its attention to that of its MLP."""
    linear = torch.nn.Linear(16, 8)
    sparse = SparseLinear.from_dense(linear, Pattern("2:4").mask(linear.weight.abs()))
    x = torch.randn(2, 3, 16)
    y = sparse(x)
    y += 1
    y.sum().backward()
    assert torch.allclose(sparse.bias.grad, torch.full((8,), 6.0))
