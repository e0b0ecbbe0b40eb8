"""A sparse model leaves for other runtimes."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from ..conftest import thinned


@pytest.mark.parametrize("name", thinned(["llama", "gemma3", "gpt_neox"], ["llama"]))
def test_torch_export_of_a_sparse_model_and_of_its_dense_form(make_pruned, token_ids, name):
    model = make_pruned(name)
    with torch.no_grad():
        expected = model(token_ids, use_cache=False).logits
    for is_packed in (True, False):
        if not is_packed:
            model.dequantize()
        program = torch.export.export(model, (token_ids,), {"use_cache": False})
        operators = {str(node.target) for node in program.graph.nodes}
        assert ("ksparse.linear.default" in operators) == is_packed
        with torch.no_grad():
            assert torch.allclose(program.module()(token_ids, use_cache=False).logits, expected, atol=1e-6)


def test_the_dense_form_says_nothing_of_this_package(make_pruned, tmp_path):
    make_pruned().save_pretrained(tmp_path / "packed")
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed").dequantize().save_pretrained(tmp_path / "dense")
    assert sorted(path.name for path in (tmp_path / "dense").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    config = json.loads((tmp_path / "dense/config.json").read_text())
    assert not {"ksparse", "quantization_config", "sparsity_config"} & config.keys()
