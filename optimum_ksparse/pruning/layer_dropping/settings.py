"""The config of a model with fewer blocks: what it says of each block by its number goes with the block."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

# Numbers of blocks, and how many of the first blocks are of one kind.
_INDICES = ("mlp_only_layers", "moe_layers", "attn_layer_indices")
_COUNTS = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
# By these a block does something else at another place, or needs another block.
_REFUSED = {
    "num_kv_shared_layers": "later blocks read the keys and values of earlier ones",
    "kv_source_layers": "later blocks read the keys and values of earlier ones",
    "scale_attn_by_inverse_layer_idx": "a block's attention is scaled by its number",
    "is_heterogeneous": "blocks have settings of their own (per_layer_config)",
}


def why_not(config: PreTrainedConfig) -> str | None:
    """Why no block of a model with this (text) config can be dropped; None where nothing in it speaks against that."""
    for name, reason in _REFUSED.items():
        if getattr(config, name, None):
            return f"{reason} ({name} of its config)"
    return None


def smaller(config: PreTrainedConfig, kept: Sequence[int], source: str) -> dict[str, Any]:
    """What to change in a (text) config so that it describes a model of the blocks `kept` alone, in that order.

    Each list with an entry for each block is one of its blocks' settings where `source`, the code of the model, takes
    the entry of a number from it; it is written out even where the config derives it from a rule, which counts blocks.
    """
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    total = config.num_hidden_layers
    for name, value in vars(config).items():
        if name in _INDICES and value:
            changes[name] = [kept.index(index) for index in value if index in kept]
        elif name in _COUNTS and type(value) is int and value < total:
            changes[name] = sum(index < value for index in kept)
        elif isinstance(value, list | tuple) and len(value) == total and _is_about_blocks(name, source):
            changes[name] = type(value)(value[index] for index in kept)
    step = getattr(config, "decoder_sparse_step", 1)
    if step > 1:  # every step-th block has experts: now those that have none are listed
        dense = {index for index in range(total) if (index + 1) % step} | set(config.mlp_only_layers)
        changes |= {"decoder_sparse_step": 1, "mlp_only_layers": [new for new, old in enumerate(kept) if old in dense]}
    if "attention_types" in vars(config) and "attention_layers" in changes:  # GPT-Neo derives the one from the other
        changes["attention_types"] = [[list(changes["attention_layers"]), 1]]
    return changes


def _is_about_blocks(name: str, source: str) -> bool:
    """Whether the code takes one entry after the other from a list, or that of a number; others have as many entries
    as there are blocks by chance."""
    by_number = rf"\b{name}\[\s*(?:[a-z_]+\.)*[a-z_]\w*(?:\s*[-+%]\s*\w+)?\s*\]"
    in_turn = rf"\bin\s+(?:enumerate\(|zip\([^()]*|range\(len\()?\s*(?:[a-z_]+\.)*{name}\b"
    counted = rf"\blen\((?:[a-z_]+\.)*{name}\)"
    if name.startswith("_") or name == "architectures":
        return False
    # The cache reads those as well, for all models.
    return name.endswith("layer_types") or re.search(f"{by_number}|{in_turn}|{counted}", source) is not None
