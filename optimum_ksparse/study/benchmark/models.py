"""Whole models: tokens per second of prefill and of decoding, dense and sparse, one after the other."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ...api import sparsify
from ...blocks import find_blocks
from ...checkpoint import sparse_modules
from ...config import SparsityConfig
from ...evaluation.speed import decoding_speed, fitting_prompt, prefill_speed
from ...nn import dense_weight, is_linear_map
from ...runtime import autotune_kernels


def random_model(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of random weights, made where it runs."""
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def bench_model(
    model: PreTrainedModel,
    name: str,
    pattern: str = "2:4",
    *,
    values: str | None = None,
    prompt_tokens: int = 1024,
    new_tokens: int = 32,
    batch: int = 1,
) -> dict[str, Any]:
    """A row of results for a model, sparse, or pruned by magnitude to `pattern` and `values` (as SparsityConfig has
    them): it is left as the other one. The prompt is cut to the context. Decoding takes one token a step, `new_tokens`
    in all, into a static cache, on a GPU as a CUDA graph, for the dense model too."""
    prompt_tokens = fitting_prompt(model, prompt_tokens, new_tokens)
    modules = sparse_modules(model).values()
    patterns = {str(module.pattern) for module in modules} or {pattern}
    named = patterns.pop() if len(patterns) == 1 else "mixed"
    row: dict[str, Any] = {"model": name, "dtype": str(model.dtype).removeprefix("torch."), "pattern": named}
    row["values"] = next((module.values for module in modules), values)  # a model has one type
    row |= {"batch": batch, "prompt_tokens": prompt_tokens}
    for kind in ("sparse", "dense") if sparse_modules(model) else ("dense", "sparse"):
        if kind == "dense" and sparse_modules(model):
            model.dequantize()
        if kind == "sparse":
            if not sparse_modules(model):
                sparsify(model, SparsityConfig("magnitude", pattern, values=values))
            autotune_kernels(model)
        row[f"{kind}_prefill_tokens_per_s"] = round(prefill_speed(model, batch, prompt_tokens), 2)
        decode, graphs = decoding_speed(model, batch, prompt_tokens, new_tokens)
        row[f"{kind}_decode_tokens_per_s"] = round(decode, 2)
        row["cuda_graphs"] = graphs and row.get("cuda_graphs", True)
    for phase in ("prefill", "decode"):
        sparse, dense = (row[f"{kind}_{phase}_tokens_per_s"] for kind in ("sparse", "dense"))
        row[f"{phase}_speedup"] = round(sparse / dense, 4)
    return row


_SIZES = ("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers")
# Model type, the sizes above, attention heads, and what else decides the speed; the rest of a configuration is the
# library's default.
_ROWS: dict[str, tuple[str, tuple[int, ...], int, dict[str, int]]] = {
    "polyglot-ko-5.8b": ("gpt_neox", (30080, 2048, 4096, 16384, 28), 16, {}),
    "polyglot-ko-12.8b": ("gpt_neox", (30080, 2048, 5120, 20480, 40), 40, {}),
    "llama-3-8b": ("llama", (128256, 8192, 4096, 14336, 32), 32, {"num_key_value_heads": 8}),
    "gemma-3-270m": ("gemma3_text", (262144, 32768, 640, 2048, 18), 4, {"num_key_value_heads": 1, "head_dim": 256}),
}
MODELS = tuple(_ROWS)


def model_config(name: str) -> PreTrainedConfig:
    """The configuration of a model of `MODELS`. Raises ValueError that lists them."""
    if name not in MODELS:
        raise ValueError(f"models: {name!r} is not known; allowed: {', '.join(MODELS)}")
    model_type, sizes, heads, more = _ROWS[name]
    return AutoConfig.for_model(model_type, num_attention_heads=heads, **dict(zip(_SIZES, sizes, strict=True)), **more)


def layer_shapes(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """Distinct [out, in] of the linear maps in a model's blocks, the largest first; no weight is made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = [m for block in find_blocks(model).blocks for m in block.modules() if is_linear_map(m)]
    shapes = {(weight.shape[0], weight.shape[1]) for weight in map(dense_weight, linears)}
    return sorted(shapes, key=lambda shape: (-shape[0] * shape[1], shape))


def parse_shape(text: str) -> tuple[int, int]:
    """`"4096x11008"` as (out, in). Raises ValueError for another form."""
    match = re.fullmatch(r"([1-9][0-9]{0,6})x([1-9][0-9]{0,6})", text)
    if match is None:
        raise ValueError(f"shapes: {text!r} is not OUTxIN, such as 4096x11008")
    return int(match[1]), int(match[2])
