"""vLLM serves sparse checkpoints. With the real vLLM, in an environment of its own: `make test-vllm`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from optimum_ksparse.checkpoint import sparse_layers
from optimum_ksparse.nn import SparseLinear

from .models import engine, greedy, modules_of, sparse_model, written

pytestmark = pytest.mark.vllm


def sparse_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """Number of sparse modules and the bytes of their packed weights."""
    modules = [module for module in model.modules() if isinstance(module, SparseLinear)]
    return len(modules), sum(module.packed_bytes for module in modules)


@pytest.mark.parametrize(
    ("name", "pattern", "settings"),
    [
        ("llama", "2:4", {}),
        ("llama", "50%", {}),
        ("llama", "50%/8x8", {}),
        ("llama", "2:4", {"modules_to_not_convert": ["k_proj", "gate_proj"]}),
        ("llama", "2:4", {"allocation": "owl", "method_settings": {"target_density": 0.6}, "method": "wanda"}),
        ("gemma3", "4:8", {}),
        ("qwen3", "1:4", {}),
        ("phi3", "3:8", {}),
        ("opt", "2:4", {}),
        ("gpt2", "2:4", {}),
        ("gpt_neox", "2:4", {}),
        ("gpt_neox", "60%", {}),
    ],
)
def test_greedy_text_is_that_of_transformers_from_packed_weights(tmp_path, name, pattern, settings):
    model = sparse_model(name, pattern, **settings)
    model.save_pretrained(tmp_path)
    expected = greedy(model)
    with engine(tmp_path) as llm:
        number, packed_bytes = modules_of(llm, sparse_bytes)
        assert written(llm) == expected
    layers = sparse_layers(model).values()
    assert 0 < number <= len(layers)  # some are merged
    assert packed_bytes == sum(layer.packed_bytes for layer in layers)
