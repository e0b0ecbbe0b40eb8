"""vLLM serves sparse checkpoints. With the real vLLM, in an environment of its own: `make test-vllm`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from optimum_ksparse.checkpoint import sparse_layers
from optimum_ksparse.nn import SparseLinear

from ..conftest import REPOSITORY
from .models import PROMPTS, engine, greedy, modules_of, sparse_model, written

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


def test_ranks_share_a_model_wherever_they_cut_its_groups(tmp_path):
    """136 columns: two ranks cut a group of eight, four cut bytes of the mask."""
    expected = {}
    # GPT-NeoX is here for one rank too: vLLM runs the code of transformers, whose classes it changes in its process.
    for name, pattern, ranks in (
        ("llama", "4:8", 2),
        ("qwen3", "2:4", 4),
        ("gpt_neox", "50%", 2),
        ("gpt_neox", "50%", 1),
    ):
        model = sparse_model(name, pattern)
        model.save_pretrained(tmp_path / name)
        expected[f"{tmp_path / name}={ranks}"] = greedy(model)
    command = [sys.executable, "-m", "tests.serving.generate", json.dumps(PROMPTS), *expected]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected
