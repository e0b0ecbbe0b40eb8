"""Other quantizers before and after pruning, and configs of sparse models on dense ones: what is saved is what is
there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    FineGrainedFP8Config,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_ksparse import SparsityConfig, sparsify
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.config import DENSE_CONFIG_KEY


def logits(model, token_ids):
    with torch.no_grad():
        return model.eval()(token_ids).logits


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def fp8(make_model, tmp_path) -> Path:
    """A checkpoint in blocks of FP8 with a scale each."""
    folder = tmp_path / "fp8"
    make_model("llama", hidden_size=128, intermediate_size=256).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "proj" in name]:
        weights[name.replace("weight", "weight_scale_inv")] = torch.full(
            [-(-s // 128) for s in weights[name].shape], 0.01
        )
        weights[name] = (weights[name] / 0.01).to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    asked = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({**config_of(folder), "quantization_config": asked}))
    return folder


@pytest.mark.parametrize("storage", ["dense", "dequantized"])
def test_a_model_that_came_through_another_quantizer_is_saved_as_it_is_now(fp8, tmp_path, token_ids, storage):
    arguments = {"dtype": torch.float32, "quantization_config": FineGrainedFP8Config(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(fp8, **arguments)
    sparsify(
        model, SparsityConfig("magnitude", "2:4", dataset=None, storage="dense" if storage == "dense" else "packed")
    )
    if storage == "dequantized":
        model.dequantize()
    model.save_pretrained(tmp_path / "saved")
    assert {tensor.dtype for tensor in load_file(tmp_path / "saved/model.safetensors").values()} <= {
        torch.float32,
        torch.uint8,
    }
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))


class RoundingConfig(QuantizationConfigMixin):
    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = "rounding"


class RoundingQuantizer(HfQuantizer):
    """A quantizer of somebody else, which rounds weights and adds a scale of its own."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model, **kwargs):
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_buffer("steps", torch.ones(1))

    def _process_model_after_weight_loading(self, model, **kwargs):
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return False


@pytest.fixture
def rounding(monkeypatch) -> RoundingConfig:
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "rounding", RoundingQuantizer)
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "rounding", RoundingConfig)
    return RoundingConfig()


def check_theirs(model, folder: Path) -> None:
    assert isinstance(model.hf_quantizer, RoundingQuantizer) and not sparse_modules(model)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    model.save_pretrained(folder)
    config = config_of(folder)
    assert config["quantization_config"]["quant_method"] == "rounding" and DENSE_CONFIG_KEY not in config
    assert "model.layers.0.mlp.up_proj.steps" in load_file(folder / "model.safetensors")
    assert not (folder / "sparsity_report.json").exists()


def test_a_dense_stored_checkpoint_that_somebody_else_quantizes_is_theirs(make_model, token_ids, tmp_path, rounding):
    model = make_model("llama")
    sparsify(model, SparsityConfig("magnitude", dataset=token_ids, storage="dense"))
    model.save_pretrained(tmp_path / "sparse")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", quantization_config=rounding)
    check_theirs(theirs, tmp_path / "once")
    # A program that does not import this package keeps the key in the config.
    record = {DENSE_CONFIG_KEY: config_of(tmp_path / "sparse")[DENSE_CONFIG_KEY]}
    (tmp_path / "once/config.json").write_text(json.dumps({**config_of(tmp_path / "once"), **record}))
    check_theirs(AutoModelForCausalLM.from_pretrained(tmp_path / "once"), tmp_path / "twice")


def test_sparse_settings_and_another_quantizer_do_not_go_together(make_pruned, tmp_path, rounding):
    make_pruned(storage="dense").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not go together"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, sparsity_config=SparsityConfig("magnitude", "2:4"), quantization_config=rounding
        )


@pytest.fixture(params=["packed", "dense"])
def sparse(request, make_model, token_ids, tmp_path) -> Path:
    model = make_model("llama")
    sparsify(model, SparsityConfig("magnitude", dataset=token_ids, storage=request.param))
    model.save_pretrained(tmp_path / "sparse")
    return tmp_path / "sparse"


def check_dense(folder: Path, model, token_ids) -> None:
    config = config_of(folder)
    assert "quantization_config" not in config and DENSE_CONFIG_KEY not in config
    again = type(model).from_pretrained(folder)
    assert not sparse_modules(again) and torch.equal(again(token_ids).logits, model.eval()(token_ids).logits)


def test_a_new_model_of_a_sparse_ones_config_is_a_dense_one(sparse, token_ids, tmp_path):
    config = AutoConfig.from_pretrained(sparse)
    makers = {
        "causal": lambda: AutoModelForCausalLM.from_config(config),
        "class": lambda: LlamaForCausalLM(config),
        "task": lambda: AutoModelForSequenceClassification.from_config(config),
        "loaded": lambda: LlamaForCausalLM(AutoModelForCausalLM.from_pretrained(sparse).config),
    }
    for name, make in makers.items():
        model = make()
        model.config.pad_token_id = 0
        model.save_pretrained(tmp_path / name)
        check_dense(tmp_path / name, model, token_ids)
    # The config that was passed in is as it was.
    again = AutoModelForCausalLM.from_pretrained(sparse, config=config)
    assert getattr(again, "sparsity_report", None) is not None


def test_a_trainers_new_model_is_a_dense_one(sparse, token_ids, tmp_path):
    config = AutoConfig.from_pretrained(sparse)
    arguments = TrainingArguments(tmp_path / "run", max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    data = [{"input_ids": ids, "labels": ids} for ids in token_ids]
    trainer = Trainer(model_init=lambda: AutoModelForCausalLM.from_config(config), args=arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(tmp_path / "trained")
    check_dense(tmp_path / "trained", trainer.model, token_ids)


def test_dense_weights_beside_a_packed_record_load_dense_with_a_warning(make_pruned, make_model, token_ids, tmp_path):
    """As earlier versions wrote them, or `config.save_pretrained` beside weights."""
    make_pruned().config.save_pretrained(tmp_path)
    model = make_model("llama")
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not sparse_modules(again) and torch.equal(logits(again, token_ids), logits(model, token_ids))
    again.save_pretrained(tmp_path / "saved")
    check_dense(tmp_path / "saved", again, token_ids)
