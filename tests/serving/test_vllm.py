"""vLLM serves sparse checkpoints. With the real vLLM, in an environment of its own: `make test-vllm`."""
# ruff: noqa: E402  (nothing is imported where vLLM is not)

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from transformers import AutoModelForCausalLM, MixtralConfig
from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.model_loader import DefaultModelLoader

from optimum_ksparse import SparsityConfig, serving, sparsify
from optimum_ksparse.checkpoint import sparse_layers
from optimum_ksparse.config import QUANT_METHOD
from optimum_ksparse.nn import SparseLinear
from optimum_ksparse.serving import register
from optimum_ksparse.serving.config import ServingConfig

from ..conftest import REPOSITORY, VOCABULARY
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
        ("llama", "2:4", {"values": "int8"}),
        ("llama", "50%", {"values": "int4", "group_size": 64, "modules_to_not_convert": ["k_proj", "gate_proj"]}),
        ("phi3", "2:4", {"values": "int4", "group_size": 64}),
        ("gpt2", "4:8", {"values": "int8", "group_size": 64}),
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
    expected_bytes = sum(layer.packed_bytes for layer in layers)
    if pattern == "50%" and "values" in settings:  # kept weights that are zero may be left out
        assert 0.8 * expected_bytes < packed_bytes <= expected_bytes
    else:
        assert packed_bytes == expected_bytes


@pytest.mark.parametrize(
    "cases",
    [
        # GPT-NeoX is here for one rank too: vLLM runs the code of transformers, whose classes it changes in its
        # process.
        [("llama", "4:8", 2, 64), ("gpt_neox", "50%", 2, 64), ("gpt_neox", "50%", 1, 64), ("qwen3", "2:4", 4, 8)],
        [("llama", "4:8", 2, 64, "int8"), ("gpt_neox", "50%", 2, 64, "int4"), ("qwen3", "2:4", 2, 64, "int4")],
    ],
    ids=["16 bit", "quantised"],
)
def test_ranks_share_a_model_wherever_they_cut_its_groups(tmp_path, cases):
    """136 columns: two ranks cut a group of eight and those that share a scale, four cut bytes of the mask."""
    expected = {}
    for name, pattern, ranks, tokens, *values in cases:
        settings = {"values": values[0], "group_size": 64} if values else {}
        model = sparse_model(name, pattern, **settings)
        model.save_pretrained(tmp_path / name)
        expected[f"{tmp_path / name}={ranks}={tokens}"] = greedy(model, new_tokens=tokens)
    command = [sys.executable, "-m", "tests.serving.generate", json.dumps(PROMPTS), *expected]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


@pytest.mark.parametrize(("dtype", "values"), [("bfloat16", None), ("float16", None), ("bfloat16", "int8")])
def test_sixteen_bits_are_as_close_as_rounding_lets_them_be(tmp_path, dtype, values):
    from vllm import SamplingParams

    model = sparse_model("llama", "2:4", getattr(torch, dtype), values=values)
    model.save_pretrained(tmp_path)
    ids = PROMPTS[0]
    with torch.no_grad():
        expected = model.float()(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    with engine(tmp_path, dtype=dtype, max_logprobs=VOCABULARY) as llm:
        assert modules_of(llm, sparse_bytes)[0]
        sampling = SamplingParams(max_tokens=1, logprobs=VOCABULARY, temperature=0, detokenize=False)
        (output,) = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0].outputs
    found = torch.tensor([output.logprobs[0][token].logprob for token in range(VOCABULARY)])
    assert (found - expected).abs().max() < 0.05 * expected.std()


@pytest.mark.parametrize("values", [None, "int4"])
def test_an_adapter_is_served_on_the_sparse_base(tmp_path, values):
    from peft import LoraConfig, get_peft_model
    from vllm.lora.request import LoRARequest

    model = sparse_model("llama", "2:4", values=values)
    model.save_pretrained(tmp_path / "base")
    base = greedy(model)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = greedy(adapted.eval())
    assert expected != base
    with engine(tmp_path / "base", enable_lora=True, max_lora_rank=8) as llm:
        request = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
        assert written(llm, lora_request=request) == expected
        assert written(llm) == base


@pytest.mark.parametrize("values", [None, "int8"])
def test_dense_storage_is_served_as_any_dense_model(tmp_path, values):
    model = sparse_model("llama", "2:4", storage="dense", values=values)
    model.save_pretrained(tmp_path)
    expected = greedy(model)
    with engine(tmp_path) as llm:
        assert modules_of(llm, sparse_bytes) == (0, 0)
        assert written(llm) == expected


def test_a_damaged_mask_is_told_by_the_name_of_its_tensor(tmp_path):
    sparse_model("llama", "2:4").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight_mask"
    tensors[name][5, 3] ^= 0b111
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=name), engine(tmp_path):
        pass


def test_stacked_experts_are_refused_with_what_to_do(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=VOCABULARY, num_hidden_layers=1, num_local_experts=4, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    sparsify(model, SparsityConfig("magnitude", "2:4", dataset=torch.zeros(1, 8, dtype=torch.int64)))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"experts.*dequantize"), engine(tmp_path):
        pass


def test_registering_again_does_nothing():
    register()
    loader = DefaultModelLoader.get_all_weights
    register()
    assert DefaultModelLoader.get_all_weights is loader
    assert get_quantization_config(QUANT_METHOD) is ServingConfig


def test_another_plugin_of_the_same_name_is_told(monkeypatch):
    class Other(ServingConfig):
        pass

    register()
    monkeypatch.setitem(quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG, QUANT_METHOD, Other)
    with pytest.raises(ValueError, match=r"two plugins.*VLLM_PLUGINS"):
        register()


def test_an_unknown_version_is_warned_of_and_a_lost_interface_is_told(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(serving.logger, "warning", said.append)
    monkeypatch.setattr(serving.logger, "error", said.append)
    register()
    assert said == []
    monkeypatch.setattr(vllm, "__version__", "9.1.0")
    register()
    assert len(said) == 1 and all(version in said[0] for version in ("9.1.0", serving.TESTED[0]))
    monkeypatch.setitem(sys.modules, "optimum_ksparse.serving.config", None)
    register()
    assert len(said) == 2 and "cannot serve" in said[1]
