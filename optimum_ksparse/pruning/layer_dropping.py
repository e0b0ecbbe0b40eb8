"""Dropping whole decoder blocks: those that change the hidden states least, by ShortGPT's Block Influence (Men et al.
2024, arXiv 2403.03853, equation 1), the mean over tokens of 1 − cos(X_i, X_{i+1}) of the states before and after
block i. What is left is an ordinary smaller model.

Before anything is changed, models are built on the meta device by the config as it is and by that of fewer blocks, and
compared: what follows the place of a block, and not the block, is an error.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..blocks import DecoderBlocks, evaluation_mode, find_blocks
from ..blocks.calls import split_call
from ..blocks.probe import hidden_of
from ..blocks.running import replaced_forward, run_decoder
from ..checkpoint import sparse_modules
from ..checks import check_integer
from ..data import CalibrationData, calibration_tokens, load_tokenizer, usual_context
from .distributed import current

logger = logging.get_logger(__name__)

# Where a module keeps the number of its block, which the key-value cache goes by.
_NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number")
# Settings that list numbers of blocks, and those that say how many of the first blocks are of one kind.
_INDICES = ("mlp_only_layers", "moe_layers", "attn_layer_indices")
_COUNTS = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
# Of the lists with as many entries as there are blocks, those that have one for each; others do by chance.
_OF_BLOCKS = re.compile(r"num_|[^_].*(layer|block)|layer|block")
# By these a block does something else at another place, or needs another block.
_REFUSED = {
    "num_kv_shared_layers": "later blocks read the keys and values of earlier ones",
    "kv_source_layers": "later blocks read the keys and values of earlier ones",
    "scale_attn_by_inverse_layer_idx": "a block's attention is scaled by its number",
    "is_heterogeneous": "blocks have settings of their own (per_layer_config)",
}


@torch.no_grad()
def drop_layers(
    model: PreTrainedModel,
    number: int,
    dataset: Any = "mc4-ko",
    tokenizer: Any = None,
    batch_size: int = 1,
    **calibration: Any,
) -> list[int]:
    """Takes the decoder blocks that change the hidden states least out of a dense model, in place; the last block with
    attention stays. Save the model, or prune it, as any other.

    Args:
        model: a decoder-only model whose blocks run one after another.
        number: blocks to drop.
        dataset, tokenizer, batch_size: as in `SparsityConfig`.
        calibration: `num_samples`, `seq_len`, `seed`, `prepend_bos`, as there.

    Returns:
        The numbers that the dropped blocks had, in order.

    Raises:
        TypeError, ValueError: blocks of the model cannot be dropped, or the data do not fit it; nothing is changed.
    """
    if sparse_modules(model):
        raise ValueError("the model is sparse already: drop blocks first, then prune what is left")
    blocks = find_blocks(model)
    total = len(blocks.blocks)
    if not 1 <= check_integer("number", number, 1) < total:
        raise ValueError(f"number={number} does not fit {type(model).__name__}, which has {total} decoder blocks")
    _plan(blocks, list(range(total - number)))
    check_integer("batch_size", batch_size, 1)
    longest = CalibrationData.seq_len
    calibration.setdefault("seq_len", min(longest, usual_context(model.config) or longest))
    data = CalibrationData(dataset, tokenizer, **calibration)
    tokenizer = load_tokenizer(data, model.name_or_path)
    with evaluation_mode(model):
        scores = current().once(
            lambda: block_influence(blocks, calibration_tokens(data, model, tokenizer).ids, batch_size)
        )
    order = sorted(range(total), key=lambda index: (scores[index], index))
    # A hybrid cannot write text without attention: its cache counts the tokens there.
    has_attention = [any("Attention" in type(m).__name__ for m in block.modules()) for block in blocks.blocks]
    attention = [index for index in order if has_attention[index]]
    dropped = sorted([index for index in order if index not in attention[-1:]][:number])
    remove_blocks(blocks, dropped)
    words = ", ".join(f"{index} ({score:.4f})" for index, score in enumerate(scores))
    logger.warning(f"Dropped decoder blocks {', '.join(map(str, dropped))}; each block changes (1 - cosine): {words}.")
    return dropped


def block_influence(blocks: DecoderBlocks, ids: torch.Tensor, batch_size: int) -> list[float]:
    """Mean of 1 − cosine between the inputs and the outputs of each block, over all tokens of `ids` [samples, tokens].

    Raises:
        ValueError: hidden states are NaN or Inf, or the blocks do not run one after another, each once.
    """
    totals = [0.0] * len(blocks.blocks)
    calls: list[int] = []

    def watched(index: int) -> Callable[..., Any]:
        original = blocks.blocks[index].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            before = split_call(args, kwargs)[0].clone()  # a block may write into its input
            output = original(*args, **kwargs)
            calls.append(index)
            after = hidden_of(output).to(before.device)
            totals[index] += float((1 - F.cosine_similarity(before.float(), after.float(), dim=-1)).double().sum())
            return output

        return forward

    with replaced_forward(blocks.blocks, watched):
        for batch in ids.split(batch_size):
            calls.clear()
            run_decoder(blocks.decoder, batch)
            if calls != list(range(len(totals))):
                raise _refusal(blocks, "it does not run them one after another, each once")
    scores = torch.tensor(totals, dtype=torch.float64) / ids.numel()
    if not bool(scores.isfinite().all()):
        raise ValueError("hidden states hold NaN or Inf; load the model in float32 or bfloat16")
    return scores.tolist()


def remove_blocks(blocks: DecoderBlocks, dropped: Sequence[int]) -> None:
    """Takes the blocks of these numbers out of the model and its config. Raises ValueError where the model without
    them would not be the one that its config describes; then nothing has been changed."""
    model = blocks.model
    kept = [index for index in range(len(blocks.blocks)) if index not in dropped]
    changes, attributes = _plan(blocks, kept)
    _keep(model, blocks, kept)
    text_config = model.config.get_text_config(decoder=True)
    configs = [getattr(module, "config", None) for module in model.modules()]
    for config in [text_config, *(config for config in configs if isinstance(config, type(text_config)))]:
        for name, value in changes.items():
            setattr(config, name, value)
    for path, name, value in attributes:
        setattr(model.get_submodule(path), name, value)


def _plan(blocks: DecoderBlocks, kept: list[int]) -> tuple[dict[str, Any], list[tuple[str, str, Any]]]:
    """What to change so that the blocks `kept` are the whole model: settings of its config, and attributes of its
    modules (path after the change, name, value). Raises ValueError where that makes no such model."""
    model, prefix = blocks.model, blocks.prefixes[0]
    config = model.config.get_text_config(decoder=True)
    if len(blocks.list_names) > 1:
        raise _refusal(blocks, f"it has several stacks of blocks ({', '.join(blocks.list_names)})")
    for name, reason in _REFUSED.items():
        if getattr(config, name, None):
            raise _refusal(blocks, f"{reason} ({name} of its config)")
    changes = smaller(config, kept)
    try:
        before, after = _skeleton(model, {}), _skeleton(model, changes)
    except (TypeError, ValueError, KeyError, IndexError, StrictDataclassError) as error:
        raise _refusal(blocks, f"no config of {len(kept)} blocks can be made of its own: {error}") from error
    if _shapes(model) != _shapes(before):
        raise _refusal(blocks, "its tensors are not those that its config describes")
    _keep(before, blocks, kept)
    if _shapes(before) != _shapes(after):
        raise _refusal(blocks, f"its tensors are not those of a model of {len(kept)} blocks")
    modules, attributes = dict(after.named_modules()), []
    for path, module in before.named_modules():
        other = modules.get(path)
        if other is None or type(module) is not type(other):
            raise _refusal(blocks, f"{path} would be {type(other).__name__}")
        for name, old, value in _differences(module, other):
            if path.startswith(prefix) and name not in _NUMBERS and not (value and value == changes.get(name)):
                raise _refusal(blocks, f"{name} of {path} would change from {old!r} to {value!r}, by its place alone")
            attributes.append((path, name, value))
    return changes, attributes


def _keep(model: PreTrainedModel, blocks: DecoderBlocks, kept: Sequence[int]) -> None:
    """Takes all other blocks out of a model in which they lie as in that of `blocks`."""
    modules = model.get_submodule(blocks.prefixes[0].removesuffix("."))
    modules._modules = {str(new): modules._modules[str(old)] for new, old in enumerate(kept)}


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def smaller(config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """What to change in a (text) config so that it describes a model of the blocks `kept` alone. Lists with an entry
    for each block are written out even where the config derives them from a rule, which counts blocks."""
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    total = config.num_hidden_layers
    for name, value in vars(config).items():
        if name in _INDICES and value:
            changes[name] = [kept.index(index) for index in value if index in kept]
        elif name in _COUNTS and type(value) is int and value < total:
            changes[name] = sum(index < value for index in kept)
        elif isinstance(value, list | tuple) and len(value) == total and _OF_BLOCKS.match(name):
            changes[name] = type(value)(value[index] for index in kept)
    step = getattr(config, "decoder_sparse_step", 1)
    if step > 1:  # every step-th block has experts: now those that have none are listed
        dense = {index for index in range(total) if (index + 1) % step} | set(config.mlp_only_layers)
        changes |= {"decoder_sparse_step": 1, "mlp_only_layers": [new for new, old in enumerate(kept) if old in dense]}
    if "attention_types" in vars(config) and "attention_layers" in changes:  # GPT-Neo derives the one from the other
        changes["attention_types"] = [[list(changes["attention_layers"]), 1]]
    return changes


def _skeleton(model: PreTrainedModel, changes: Mapping[str, Any]) -> PreTrainedModel:
    """A model on the meta device by the config of `model` with changes, as it comes out of `config.json`."""
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config.get_text_config(decoder=True), name, value)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        config = type(config).from_pretrained(folder)
    with torch.device("meta"):
        built: PreTrainedModel = type(model)._from_config(config)
    return built


def _differences(before: nn.Module, after: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of plain attributes in which two modules differ."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return all(map(is_plain, value))
        return value is None or isinstance(value, bool | int | float | str)

    for name, value in vars(after).items():
        if name[0] != "_" and is_plain(value) and (old := vars(before).get(name)) != value:
            yield name, old, value


def _refusal(blocks: DecoderBlocks, reason: str) -> ValueError:
    return ValueError(f"blocks of {type(blocks.model).__name__} cannot be dropped: {reason}")
