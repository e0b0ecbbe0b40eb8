"""Models by name: the shapes of their layers, and their configurations for whole models of random weights."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ...blocks import find_blocks
from ...nn import dense_weight, is_linear_map

_LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192}
_NEOX = {"model_type": "gpt_neox", "vocab_size": 30080, "max_position_embeddings": 2048}
# What decides the speed; the rest of a configuration is the library's default.
MODELS: dict[str, dict[str, Any]] = {
    "polyglot-ko-5.8b": {
        **_NEOX,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "polyglot-ko-12.8b": {
        **_NEOX,
        "hidden_size": 5120,
        "intermediate_size": 20480,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "llama-3-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "gemma-3-270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "max_position_embeddings": 32768,
    },
}


def model_config(name: str) -> PreTrainedConfig:
    """The configuration of a model of `MODELS`. Raises ValueError that lists them."""
    if name not in MODELS:
        raise ValueError(f"models: {name!r} is not known; allowed: {', '.join(MODELS)}")
    settings = dict(MODELS[name])
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def layer_shapes(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """Distinct [out, in] of the linear maps in a model's blocks, the largest first; no weight is made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = [m for block in find_blocks(model).blocks for m in block.modules() if is_linear_map(m)]
    shapes = {_shape(linear) for linear in linears}
    return sorted(shapes, key=lambda shape: (-shape[0] * shape[1], shape))


def parse_shape(text: str) -> tuple[int, int]:
    """`"4096x11008"` as (out, in). Raises ValueError for another form, or an in that 4 does not divide."""
    match = re.fullmatch(r"([1-9][0-9]{0,6})x([1-9][0-9]{0,6})", text)
    if match is None:
        raise ValueError(f"shapes: {text!r} is not OUTxIN, such as 4096x11008")
    if int(match[2]) % 4:
        raise ValueError(f"shapes: {text!r} has {match[2]} input features, which 4 does not divide")
    return int(match[1]), int(match[2])


def _shape(linear: nn.Module) -> tuple[int, int]:
    out_features = getattr(linear, "out_features", None)
    if out_features is None:  # Conv1D
        return tuple(dense_weight(linear).shape)  # type: ignore[return-value]
    return int(out_features), int(linear.in_features)  # type: ignore[arg-type]
