"""The sweep over all families, on some of them."""

from __future__ import annotations

import importlib
import json
import os

import pytest
import torch

from .conftest import REPOSITORY

torch.set_num_threads(1)


@pytest.fixture
def families(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "examples/benchmarks")
    return importlib.import_module("families")


def test_the_table_says_what_works_what_is_refused_and_what_fails(families, tmp_path, monkeypatch):
    assert families.main(tmp_path, ["llama", "bert"]) == 0
    rows = json.loads((tmp_path / "families.json").read_text())["rows"]
    assert rows["llama/LlamaForCausalLM"]["outcome"] == "works"
    refused = rows["bert/BertLMHeadModel"]
    assert refused["outcome"] == "refused" and "bidirectional" in refused["note"]

    monkeypatch.setattr(families, "prune_checkpoint", lambda *arguments, **settings: os._exit(3))
    assert families.main(tmp_path, ["gpt2"]) == 1
    rows = json.loads((tmp_path / "families.json").read_text())["rows"]
    assert rows["gpt2/GPT2LMHeadModel"]["outcome"] == "fails" and len(rows) == 3
    assert "| gpt2 | GPT2LMHeadModel |" in (tmp_path / "families.md").read_text()


@pytest.mark.parametrize("kind", ["qwen2_vl", "jamba", "gemma4"])
def test_tiny_configs_shrink_what_is_inside_and_keep_every_kind_of_layer(families, kind):
    config = families.tiny_config(kind)
    text = config.get_text_config()
    assert text.hidden_size == 64 and text.vocab_size < 200
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    assert len(kinds) <= 8 and (kind == "qwen2_vl" or len(set(kinds)) == 2)
