"""Gates over experts: linear maps whose few outputs decide which experts a token is given to, and with what weight.
They are a thousandth of a model, and what they get wrong no expert can put right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..nn import dense_weight, is_linear_map
from .experts import find_stacks


def find_routers(model: PreTrainedModel, block: nn.Module) -> set[str]:
    """Names in a block of the linear maps that route tokens: the modules beside experts that end in a score for each
    expert, or in one score, and those that are called a router."""
    hidden = _hidden_size(model)
    counts = dict(_expert_counts(model.config.get_text_config(decoder=True).to_dict()))
    nothing = {number for name, number in counts.items() if "zero" in name}  # experts that do nothing, in LongCat
    routers = {
        name
        for name, module in block.named_modules()
        if is_linear_map(module) and any("router" in part.lower() for part in name.split("."))
    }
    for holder, experts, number in find_experts(model, block):
        scores = {1, number, *(number + more for more in nothing)}
        for child, module in block.get_submodule(holder).named_children():
            path = f"{holder}.{child}".lstrip(".")
            if f"{experts}.".startswith(f"{path}."):
                continue
            widths = {
                f"{path}.{name}".rstrip("."): dense_weight(linear).shape[0]
                for name, linear in module.named_modules()
                if is_linear_map(linear)
            }
            if scores & set(widths.values()) and hidden not in widths.values():  # else it is a network, as experts are
                routers |= set(widths)
    return routers


def _hidden_size(model: PreTrainedModel) -> int:
    """The size of the model's hidden states."""
    size = getattr(model.config.get_text_config(decoder=True), "hidden_size", None)
    return size if isinstance(size, int) else int(model.get_input_embeddings().weight.shape[1])  # type: ignore


def find_experts(model: PreTrainedModel, block: nn.Module) -> Iterator[tuple[str, str, int]]:
    """Experts of a block: the path of the module that holds them, their own, and how many they are. A list, or a stack
    of matrices, is one of experts where it is called so, or has as many as the config counts."""
    numbers = {number for _, number in _expert_counts(model.config.get_text_config(decoder=True).to_dict())}
    lists = {name: len(module) for name, module in block.named_modules() if isinstance(module, nn.ModuleList)}
    stacks = {name.rpartition(".")[0]: len(stack.weight) for name, stack in find_stacks(block).items()}
    for path, number in {**lists, **stacks}.items():
        if number > 1 and path and (number in numbers or "expert" in path.lower()):
            yield path.rpartition(".")[0], path, number


def _expert_counts(settings: Mapping[Any, Any]) -> Iterator[tuple[str, int]]:
    """Numbers that a config gives under a name with "expert" in it, with the name."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _expert_counts(value)
        elif "expert" in str(name) and type(value) is int and value > 0:
            yield name, value
