"""Tensors that a checkpoint lacks, or that hold no numbers: named, before they are used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from optimum_ksparse import SparsityConfig, prune_checkpoint
from optimum_ksparse.checkpoint import sparse_modules

from ..conftest import thinned

Weights = dict[str, torch.Tensor]
OUTSIDE = {
    "llama": ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"],
    "gpt2": ["transformer.wpe.weight", "transformer.ln_f.bias"],
}
CASES = [(family, name) for family, names in OUTSIDE.items() for name in names]


def alter(folder: Path, change: Callable[[Weights], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_dense_source_without_a_tensor_is_refused_before_any_work(make_model, token_ids, tmp_path, monkeypatch):
    config = SparsityConfig("wanda", "2:4", dataset=token_ids)
    for family, name in CASES:
        folder = tmp_path / name
        make_model(family).save_pretrained(folder)
        alter(folder, lambda weights, name=name: weights.pop(name))
        with pytest.raises(ValueError, match=name):
            AutoModelForCausalLM.from_pretrained(folder, sparsity_config=config)
        with pytest.raises(ValueError, match=name):
            prune_checkpoint(folder, tmp_path / "out", config)
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_a_sparse_checkpoint_without_a_tensor_is_refused(make_pruned, tmp_path, storage):
    changes: list[Callable[[Weights, str], Any]] = [
        lambda weights, name: weights.pop(name),
        lambda weights, name: weights.update({f"{name}_old": weights.pop(name)}),
        lambda weights, name: weights.update({name: torch.empty(0)}),
        lambda weights, name: weights.update({name: weights[name][:-1].contiguous()}),
    ]
    make_pruned("llama", storage=storage).save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for name in ("model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"):
        for change in changes:
            (tmp_path / "model.safetensors").write_bytes(whole)
            alter(tmp_path, lambda weights, name=name, change=change: change(weights, name))
            with pytest.raises(ValueError, match=name):
                AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
            with pytest.raises((ValueError, RuntimeError)):  # transformers names it in its report
                AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_heads_and_tied_weights_may_be_missing(make_pruned, tmp_path, token_ids, storage):
    model = make_pruned("gemma3", storage=storage)  # its output embeddings are the input's
    model.save_pretrained(tmp_path / "causal")
    assert sparse_modules(AutoModel.from_pretrained(tmp_path / "causal"))
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "causal", num_labels=3)
    classifier.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert torch.equal(again.score.weight, classifier.score.weight)
    other = {"num_labels": 5, "ignore_mismatched_sizes": True}
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier", **other).score.out_features == 5
    alter(tmp_path / "classifier", lambda weights: weights.pop("score.weight"))
    with pytest.raises(ValueError, match=r"score\.weight"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")


def test_a_language_models_head_is_not_made_up(make_pruned, tmp_path):
    make_pruned("llama").save_pretrained(tmp_path / "causal")
    AutoModel.from_pretrained(tmp_path / "causal").save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize("storage", thinned(["packed", "dense"], ["packed"]))
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_tensors_that_hold_no_numbers_are_named(make_pruned, tmp_path, monkeypatch, storage, value):
    make_pruned("llama", "50%", torch.bfloat16, storage=storage).save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    parts = {f"model.layers.{index}": "disk" for index in range(2)}
    parts |= dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places: list[dict[str, Any]] = [{}, {"device_map": parts, "offload_folder": str(tmp_path / "offload")}]
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"):
        (tmp_path / "model.safetensors").write_bytes(whole)
        alter(tmp_path, lambda weights, name=name: weights[name].view(-1)[-1:].fill_(value))
        for place in places if storage == "packed" else places[:1]:
            with pytest.raises(ValueError, match=name):
                AutoModelForCausalLM.from_pretrained(tmp_path, **place)
        with monkeypatch.context() as patch:
            patch.setenv("KSPARSE_ALLOW_NONFINITE", "1")
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
            assert sparse_modules(loaded) or storage == "dense"  # where a NaN takes the place of a zero
