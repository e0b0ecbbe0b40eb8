"""Taking experts out of a mixture of experts and its config. Which tensors go by the number of experts, and along
which dimension, is read off two models on the meta device, built by the config as it is and by that of fewer experts:
the router's rows, its biases and whatever else a family has are found in this way, with no table of architectures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from ..blocks import DecoderBlocks
from ..blocks.routers import find_experts
from .smaller_model import apply, differences, skeleton

# Settings that count the experts which tokens are routed to; not shared ones, nor how many a token is given to.
_COUNTS = re.compile(r"(\w*_)?(num|n)_((routed|local)_)?experts")
# Under these names modules and configs say how many experts a token is given to, how many groups they form, and in
# how many of these they are looked for.
_PICKED = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
_GROUPS = ("num_group", "n_group", "num_expert_group")
_PICKED_GROUPS = ("topk_group",)


@dataclass(frozen=True)
class MoELayer:
    """A layer of routed experts.

    Attributes:
        holder: path in the model of the module that holds the router and the experts.
        path: of the experts, a list of modules or one module whose parameters are stacks.
        number: of experts.
    """

    holder: str
    path: str
    number: int


@dataclass(frozen=True)
class Removal:
    """What makes a model of fewer experts.

    Attributes:
        layers: those that lose experts.
        kept: how many each keeps.
        groups: into how many equal groups the router divides them; 1 where it does not.
        changes: settings of the config → new values.
        attributes: of modules: path, name and new value.
        dimensions: path of a tensor → its layer, and the dimension that has an entry for each expert.
    """

    layers: list[MoELayer]
    kept: int
    groups: int
    changes: dict[str, Any]
    attributes: list[tuple[str, str, Any]]
    dimensions: dict[str, tuple[MoELayer, int]]


def plan_removal(blocks: DecoderBlocks, share: float) -> Removal:
    """What to change so that each layer loses `share` of its experts, rounded down to whole experts, as many from each
    group of a router that divides them. Raises ValueError where that makes no model of the same class."""
    model = blocks.model
    settings = vars(_text_config(model)).items()
    counts = {name: value for name, value in settings if type(value) is int and _COUNTS.fullmatch(name)}
    layers = [layer for layer in _layers(blocks) if layer.number in counts.values()]
    numbers = {layer.number for layer in layers}
    if not layers:
        raise refusal(model, "there are no routed experts in its decoder blocks that its config counts")
    if len(numbers) > 1:
        raise refusal(model, f"its layers have different numbers of them: {sorted(numbers)}")
    [number] = numbers
    groups = max([1, *_settings(model, layers, _GROUPS)])
    kept = number - groups * int(share * number / groups + 1e-6)  # 0.29 * 100 is a little less than 29
    _check_number(model, layers, share, number, kept, groups)
    changes = {name: kept for name, value in counts.items() if value == number}
    try:
        before, after = skeleton(model, {}), skeleton(model, changes)
    except (TypeError, ValueError, KeyError, IndexError, StrictDataclassError) as error:
        raise refusal(model, f"no config of {kept} experts can be made of its own: {error}") from error
    dimensions = _dimensions(model, layers, kept, before, after)
    attributes = _attributes(model, before, after)
    return Removal(layers, kept, groups, changes, attributes, dimensions)


@torch.no_grad()
def remove_experts(model: PreTrainedModel, removal: Removal, kept: Mapping[str, Sequence[int]]) -> None:
    """Leaves of each layer (by `path`) the experts of these numbers, in this order."""
    for name, (layer, dimension) in removal.dimensions.items():
        owner, _, attribute = name.rpartition(".")
        tensor: Any = getattr(model.get_submodule(owner), attribute)
        index = torch.tensor(kept[layer.path], device=tensor.device)
        tensor.data, tensor.grad = tensor.data.index_select(dimension, index), None
    for layer in removal.layers:
        experts = model.get_submodule(layer.path)
        if isinstance(experts, nn.ModuleList):
            experts._modules = {str(new): experts[old] for new, old in enumerate(kept[layer.path])}
    apply(model, removal.changes, removal.attributes)


def _layers(blocks: DecoderBlocks) -> Iterator[MoELayer]:
    for index, block in enumerate(blocks.blocks):
        for holder, path, number in find_experts(blocks.model, block):
            yield MoELayer(blocks.name_in_model(index, holder), blocks.name_in_model(index, path), number)


def _check_number(
    model: PreTrainedModel, layers: list[MoELayer], share: float, number: int, kept: int, groups: int
) -> None:
    """Raises ValueError where no expert goes, or fewer stay than the router needs."""
    divided = "" if groups == 1 else f" in {groups} groups, which must stay equal"
    if kept == number:
        raise ValueError(
            f"share={share} of {number} experts{divided} is none; the least is {groups}/{number} = {groups / number:g}"
        )
    picked = max([1, *_settings(model, layers, _PICKED)])
    from_groups = min([groups, *_settings(model, layers, _PICKED_GROUPS)])
    # A group is scored by its two best experts in DeepSeek-V3, and those of a few groups must suffice for a token.
    least = picked if groups == 1 else groups * max(2, -(-picked // from_groups))
    if kept < least:
        raise ValueError(
            f"share={share} leaves {kept} of {number} experts{divided}, but the router gives each token to {picked} "
            f"and needs {least}; the largest share is {1 - least / number:g}"
        )


def _settings(model: PreTrainedModel, layers: list[MoELayer], names: Sequence[str]) -> list[int]:
    """The values that the config and the modules beside the experts give under one of `names`."""
    modules = [module for layer in layers for module in model.get_submodule(layer.holder).modules()]
    values = [vars(place).get(name) for place in (_text_config(model), *modules) for name in names]
    return [value for value in values if type(value) is int and value > 0]


def _dimensions(
    model: PreTrainedModel, layers: list[MoELayer], kept: int, before: nn.Module, after: nn.Module
) -> dict[str, tuple[MoELayer, int]]:
    """Which tensors have an entry for each expert, and along which dimension."""
    own, old, new = (dict(_tensors(each)) for each in (model, before, after))
    if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in old.items()}:
        raise refusal(model, "its tensors are not those that its config describes")
    gone = tuple(
        f"{layer.path}.{index}."
        for layer in layers
        if isinstance(model.get_submodule(layer.path), nn.ModuleList)
        for index in range(kept, layer.number)
    )
    dimensions = {}
    for name, tensor in old.items():
        inside = [layer for layer in layers if name.startswith(f"{layer.holder}.")]
        if inside and not tensor.dtype.is_floating_point:
            raise refusal(model, f"{name} holds whole numbers, which may be those of experts")
        if name.startswith(gone):
            continue
        if name not in new:
            raise refusal(model, f"a model of {kept} experts has no {name}")
        if tensor.shape == new[name].shape:
            continue
        changed = [
            (i, *sizes)
            for i, sizes in enumerate(zip(tensor.shape, new[name].shape, strict=True))
            if len(set(sizes)) > 1
        ]
        if not inside or [sizes for _, *sizes in changed] != [[inside[0].number, kept]]:
            raise refusal(model, f"{name} {list(tensor.shape)} would be {list(new[name].shape)} with {kept} experts")
        dimensions[name] = (max(inside, key=lambda layer: len(layer.holder)), changed[0][0])
    if new.keys() - old.keys():
        raise refusal(model, f"a model of {kept} experts has {min(new.keys() - old.keys())} as well")
    return dimensions


def _attributes(model: PreTrainedModel, before: nn.Module, after: nn.Module) -> list[tuple[str, str, Any]]:
    modules, attributes = dict(after.named_modules()), []
    for path, module in before.named_modules():
        other = modules.get(path)
        if other is None:  # an expert of a list
            continue
        if type(module) is not type(other):
            raise refusal(model, f"{path} would be {type(other).__name__}")
        attributes += [(path, name, value) for name, _, value in differences(module, other)]
    return attributes


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def refusal(model: PreTrainedModel, reason: str) -> ValueError:
    return ValueError(f"experts of {type(model).__name__} cannot be dropped: {reason}")
