"""Taking decoder blocks out of a model and its config. Before anything is changed, models are built on the meta device
by the config as it is and by that of fewer blocks, and compared: what follows the place of a block, and not the block,
is an error."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..blocks import DecoderBlocks, evaluation_mode
from ..data import CalibrationData, calibration_tokens, load_tokenizer, usual_context
from .distributed import current

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


def remove_blocks(blocks: DecoderBlocks, dropped: Sequence[int]) -> None:
    """Takes the blocks of these numbers out of the model and its config. Raises ValueError where the model without
    them would not be the one that its config describes; then nothing has been changed."""
    model = blocks.model
    kept = [index for index in range(len(blocks.blocks)) if index not in dropped]
    changes, attributes = plan_removal(blocks, kept)
    _keep(model, blocks, kept)
    apply(model, changes, attributes)


def measured(
    model: PreTrainedModel,
    dataset: Any,
    tokenizer: Any,
    calibration: dict[str, Any],
    measure: Callable[[torch.Tensor], list[Any]],
) -> list[Any]:
    """What `measure` gives of the calibration tokens [samples, tokens] with the dense model, on one process alone."""
    longest = CalibrationData.seq_len
    calibration.setdefault("seq_len", min(longest, usual_context(model.config) or longest))
    data = CalibrationData(dataset, tokenizer, **calibration)
    tokenizer = load_tokenizer(data, model.name_or_path)
    with evaluation_mode(model):
        return current().once(lambda: measure(calibration_tokens(data, model, tokenizer).ids))


def apply(model: PreTrainedModel, changes: Mapping[str, Any], attributes: Sequence[tuple[str, str, Any]]) -> None:
    """Changes settings of a model's (text) config, wherever its modules hold it, and attributes of its modules (path,
    name, value)."""
    text_config = model.config.get_text_config(decoder=True)
    configs = [getattr(module, "config", None) for module in model.modules()]
    for config in [text_config, *(config for config in configs if isinstance(config, type(text_config)))]:
        for name, value in changes.items():
            setattr(config, name, value)
    for path, name, value in attributes:
        setattr(model.get_submodule(path), name, value)


def plan_removal(blocks: DecoderBlocks, kept: list[int]) -> tuple[dict[str, Any], list[tuple[str, str, Any]]]:
    """What to change so that the blocks `kept` are the whole model: settings of its config, and attributes of its
    modules (path after the change, name, value). Raises ValueError where that makes no such model."""
    model, prefix = blocks.model, blocks.prefixes[0]
    config = model.config.get_text_config(decoder=True)
    if len(blocks.list_names) > 1:
        raise refusal(blocks, f"it has several stacks of blocks ({', '.join(blocks.list_names)})")
    for name, reason in _REFUSED.items():
        if getattr(config, name, None):
            raise refusal(blocks, f"{reason} ({name} of its config)")
    changes = smaller(config, kept)
    try:
        before, after = skeleton(model, {}), skeleton(model, changes)
    except (TypeError, ValueError, KeyError, IndexError, StrictDataclassError) as error:
        raise refusal(blocks, f"no config of {len(kept)} blocks can be made of its own: {error}") from error
    if _shapes(model) != _shapes(before):
        raise refusal(blocks, "its tensors are not those that its config describes")
    _keep(before, blocks, kept)
    if _shapes(before) != _shapes(after):
        raise refusal(blocks, f"its tensors are not those of a model of {len(kept)} blocks")
    modules, attributes = dict(after.named_modules()), []
    for path, module in before.named_modules():
        other = modules.get(path)
        if other is None or type(module) is not type(other):
            raise refusal(blocks, f"{path} would be {type(other).__name__}")
        for name, old, value in differences(module, other):
            if path.startswith(prefix) and name not in _NUMBERS and not (value and value == changes.get(name)):
                raise refusal(blocks, f"{name} of {path} would change from {old!r} to {value!r}, by its place alone")
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


def skeleton(model: PreTrainedModel, changes: Mapping[str, Any]) -> PreTrainedModel:
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


def differences(before: nn.Module, after: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of plain attributes in which two modules differ."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return all(map(is_plain, value))
        return value is None or isinstance(value, bool | int | float | str)

    for name, value in vars(after).items():
        if name[0] != "_" and is_plain(value) and (old := vars(before).get(name)) != value:
            yield name, old, value


def refusal(blocks: DecoderBlocks, reason: str) -> ValueError:
    return ValueError(f"blocks of {type(blocks.model).__name__} cannot be dropped: {reason}")
