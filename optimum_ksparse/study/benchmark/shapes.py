"""Models by name: the shapes of their layers, and their configurations for whole models of random weights."""

from __future__ import annotations

import re

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ...blocks import find_blocks
from ...nn import dense_weight, is_linear_map

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
    """`"4096x11008"` as (out, in). Raises ValueError for another form, or an in that 4 does not divide."""
    match = re.fullmatch(r"([1-9][0-9]{0,6})x([1-9][0-9]{0,6})", text)
    if match is None:
        raise ValueError(f"shapes: {text!r} is not OUTxIN, such as 4096x11008")
    if int(match[2]) % 4:
        raise ValueError(f"shapes: {text!r} has {match[2]} input features, which 4 does not divide")
    return int(match[1]), int(match[2])
