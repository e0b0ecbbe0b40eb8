"""The class that loads a checkpoint is the one that its config.json names, by transformers' own Auto classes."""

from __future__ import annotations

import json

import pytest
import transformers
from transformers import AutoModelForImageTextToText

from optimum_ksparse import SparsityConfig, sparsify
from optimum_ksparse.checkpoint.model_class import class_for_config, class_for_model, class_for_source

from ..conftest import make_config

CASES = [
    ("LlamaConfig", "LlamaForCausalLM", "AutoModelForCausalLM"),
    ("LlamaConfig", None, "AutoModelForCausalLM"),
    ("LlamaConfig", "LLaMAForCausalLM", "AutoModelForCausalLM"),  # a name of earlier days
    ("LlamaConfig", "pipeline", "AutoModelForCausalLM"),  # something of transformers, and no model
    ("LlamaConfig", "LlamaModel", "AutoModel"),
    ("LlamaConfig", "LlamaForSequenceClassification", "AutoModelForSequenceClassification"),
    ("GPT2Config", "GPT2DoubleHeadsModel", "GPT2DoubleHeadsModel"),
    ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration", "AutoModelForImageTextToText"),
    ("Qwen3VLConfig", None, "AutoModelForImageTextToText"),
    ("Gemma3Config", "Gemma3ForConditionalGeneration", "AutoModelForImageTextToText"),  # in two mappings
    ("Llama4Config", "Llama4ForConditionalGeneration", "AutoModelForImageTextToText"),  # in both, by other names
    ("Llama4Config", "Llama4ForCausalLM", "AutoModelForCausalLM"),
    ("Qwen2AudioConfig", "Qwen2AudioForConditionalGeneration", "AutoModelForMultimodalLM"),
]


@pytest.mark.parametrize(("kind", "architecture", "expected"), CASES)
def test_the_class_that_a_config_names(kind, architecture, expected):
    config = getattr(transformers, kind)()
    config.architectures = architecture and [architecture]
    assert class_for_config(config) is getattr(transformers, expected)


def test_code_that_comes_with_a_model_counts_where_it_is_trusted():
    config = transformers.LlamaConfig(architectures=["Mine"])
    config.auto_map = {"AutoModel": "modeling.Other", "AutoModelForSeq2SeqLM": "someone/code--modeling.Mine"}
    assert class_for_config(config, trust_remote_code=True) is transformers.AutoModelForSeq2SeqLM
    assert class_for_config(config) is transformers.AutoModelForCausalLM


def test_a_type_that_no_language_model_has_is_refused_with_its_name():
    with pytest.raises(ValueError, match="Foo") as caught:
        class_for_config(transformers.ViTConfig(architectures=["Foo"]))
    assert len(str(caught.value)) < 300


@pytest.fixture
def vision_language():
    text = {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    text |= {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3VLConfig(
        text_config={**text, "num_attention_heads": 4}, vision_config={**vision, "deepstack_visual_indexes": [0]}
    )
    return AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize("storage", ["plain", "packed", "dense"])
def test_a_saved_model_is_loaded_with_its_own_class(vision_language, tmp_path, storage):
    if storage != "plain":
        sparsify(vision_language, SparsityConfig("magnitude", dataset=None, storage=storage))
    vision_language.save_pretrained(tmp_path)
    loader = class_for_source(tmp_path)
    assert loader is class_for_model(vision_language) is AutoModelForImageTextToText
    model, info = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is type(vision_language)
    assert not info["missing_keys"]


def test_an_adapter_is_loaded_with_its_bases_class(tmp_path):
    make_config("llama", architectures=["LlamaModel"]).save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    text = json.dumps({"base_model_name_or_path": str(tmp_path / "base"), "peft_type": "LORA"})
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    assert class_for_source(tmp_path / "adapter") is transformers.AutoModel
