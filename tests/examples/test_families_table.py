"""The sweep over all families, on some of them."""

from __future__ import annotations

import importlib
import json
import os

import pytest
import torch

from ..conftest import REPOSITORY

torch.set_num_threads(1)


@pytest.fixture
def families(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "examples/benchmarks")
    return importlib.import_module("families")


@pytest.mark.slow
def test_the_table_says_what_works_and_what_is_refused(families, tmp_path, monkeypatch):
    def in_this_process(kind, auto):  # one that is forked here would lack the threads that other tests have started
        folder = tmp_path / kind
        folder.mkdir()
        return families.try_family(kind, auto, folder)

    monkeypatch.setattr(families, "in_child", in_this_process)
    assert families.main(tmp_path, ["llama", "bart"]) == 0
    rows = json.loads((tmp_path / "families.json").read_text())["rows"]
    assert rows["llama/LlamaForCausalLM"]["outcome"] == "works"
    refused = rows["bart/BartForCausalLM"]
    assert refused["outcome"] == "refused" and "bidirectional" in refused["note"]
    assert "| llama | LlamaForCausalLM |" in (tmp_path / "families.md").read_text()


@pytest.mark.processes
def test_a_family_that_ends_its_process_fails_and_the_others_go_on(families, tmp_path, monkeypatch):
    parent = os.getpid()

    def try_family(kind, auto, folder):
        if kind == "gpt2" and os.getpid() != parent:
            os._exit(3)
        return {"outcome": "works", "note": ""}

    monkeypatch.setattr(families, "try_family", try_family)
    assert families.main(tmp_path, ["gpt2", "llama"]) == 1
    rows = json.loads((tmp_path / "families.json").read_text())["rows"]
    assert {name.split("/")[0]: row["outcome"] for name, row in rows.items()} == {"gpt2": "fails", "llama": "works"}


@pytest.mark.parametrize("kind", ["qwen2_vl", "jamba", "gemma4"])
def test_tiny_configs_shrink_what_is_inside_and_keep_every_kind_of_layer(families, kind):
    config = families.tiny_config(kind)
    text = config.get_text_config()
    assert text.hidden_size == 64 and text.vocab_size < 200
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    assert len(kinds) <= 8 and (kind == "qwen2_vl" or len(set(kinds)) == 2)
