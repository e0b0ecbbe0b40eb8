"""Whatever this package runs on a CPU without instructions for bfloat16: no product of many tokens is in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from optimum_ksparse import (
    EvaluationProtocol,
    SparsityConfig,
    evaluate_model,
    evaluate_perplexity,
    merge_adapter,
    prune_checkpoint,
    sparsify,
)
from optimum_ksparse.pruning.layer_dropping import drop_layers

from .conftest import CONTEXT, VOCABULARY, SlowProducts, sample_texts, thinned

MakeModel = Callable[..., PreTrainedModel]
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}


@pytest.fixture
def model(make_model: MakeModel) -> PreTrainedModel:
    return make_model("llama", torch.bfloat16)


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    texts = sample_texts("evaluation")[:2]
    return str(evaluate_perplexity(model, tokenizer, texts, seq_len=16, max_tokens=64)["product_dtype"])


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"method": "wanda", "allocation": "owl", "pattern": "50%"}, marks=pytest.mark.slow),
        {"method": "sparsegpt", "pattern": "50%", "true_sequential": True},
        pytest.param(
            {"method": "admm", "reconstruct": "block", "refine": ["swaps"], "activations": "mixed"},
            marks=pytest.mark.slow,
        ),
        {"method": "magnitude"},
    ],
    ids=lambda settings: settings["method"],
)
def test_pruning_and_perplexity(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict,
    slow_products: SlowProducts,
) -> None:
    assert measure(model, tokenizer) == "float32"
    report = sparsify(model, SparsityConfig(**{"dataset": token_ids, "batch_size": 2, **settings}))
    assert report.product_dtype == (None if settings["method"] == "magnitude" else "float32")
    measure(model, tokenizer)
    assert slow_products.seen == []


@pytest.mark.parametrize("name", thinned(["bloom", "gpt2", "opt", "gemma3", "qwen3_moe", "mamba"], ["gpt2"]))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_architectures(
    make_model: MakeModel,
    token_ids: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    dtype: torch.dtype,
    slow_products: SlowProducts,
) -> None:
    if name == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            **_SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=8
        )
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    elif name == "mamba":
        config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = make_model(name, dtype)
    measure(model, tokenizer)
    sparsify(model, SparsityConfig("wanda", "50%", dataset=token_ids))
    measure(model, tokenizer)
    assert slow_products.seen == []


@pytest.mark.slow
def test_calibration_in_another_dtype(
    make_model: MakeModel, token_ids: torch.Tensor, slow_products: SlowProducts
) -> None:
    config = SparsityConfig("wanda", dataset=token_ids, calibration_dtype="bfloat16", reconstruct="block")
    assert sparsify(make_model(), config).product_dtype == "float32"
    assert slow_products.seen == []


def test_its_own_text_and_dropped_blocks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, slow_products: SlowProducts
) -> None:
    drop_layers(model, 1, "self", tokenizer, num_samples=2, seq_len=8)
    assert slow_products.seen == []


@pytest.mark.slow
def test_a_checkpoint(
    model: PreTrainedModel, token_ids: torch.Tensor, tmp_path: Path, slow_products: SlowProducts
) -> None:
    model.save_pretrained(tmp_path / "dense")
    config = SparsityConfig("sparsegpt", dataset=token_ids, reconstruct="block")
    assert prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", config).product_dtype == "float32"
    assert slow_products.seen == []


def test_results_say_it(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, slow_products: SlowProducts
) -> None:
    protocol = EvaluationProtocol(sample_texts("evaluation")[:1], seq_len=16, max_tokens=32, tasks=())
    results = evaluate_model(model, tokenizer, protocol)
    row = (results.sparse + results.dense)[0]
    assert row.protocol["dtype"] == "bfloat16" and row.environment["product_dtype"] == "float32"


@pytest.mark.slow
@pytest.mark.parametrize("method", thinned(["lora", "dora", "masked", "hira"], ["masked"]))
def test_training_and_merging(
    make_pruned: MakeModel, token_ids: torch.Tensor, tmp_path: Path, method: str, slow_products: SlowProducts
) -> None:
    pytest.importorskip("peft", reason="needs the extra finetune")
    from .adapters.models import adapted
    from .adapters.test_sparse_training import train

    model = adapted(make_pruned("llama", "50%", torch.bfloat16), method)
    trainer = train(model, token_ids, tmp_path, 2)
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    merge_adapter(trainer.model.eval(), method="solve", dataset=token_ids)
    assert slow_products.seen == []
