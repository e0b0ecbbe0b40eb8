"""What of a PEFT model is to be merged, and why it may be impossible."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import sparse_modules
from ..nn import SparseLinear
from ..records import describe_source
from .layers import SPARSE_LAYERS

# Settings of an adapter that the report repeats.
_SETTINGS = ("r", "lora_alpha", "use_rslora", "use_dora", "masked", "target_modules")


def adapted_layers(root: nn.Module, names: list[str]) -> dict[str, Any]:
    """PEFT's layers under `root` that have one of the adapters `names`, by path."""
    layers = {path: module for path, module in root.named_modules() if isinstance(module, BaseTunerLayer)}
    return {path: layer for path, layer in layers.items() if adapters_of(layer, names)}


def adapters_of(layer: BaseTunerLayer, names: list[str]) -> list[str]:
    """The adapters of a layer that are among `names`."""
    available = layer._get_available_adapters()
    return [name for name in names if name in available]


def is_sparse(layer: BaseTunerLayer) -> bool:
    return isinstance(layer.get_base_layer(), SparseLinear)


def check_mergeable(peft_model: Any, adapter_names: list[str] | None) -> list[str]:
    """The names of the adapters to merge: those given, or the active ones.

    Raises:
        TypeError: this is no PEFT model on a transformers model, or `adapter_names` is no list of names.
        ValueError: an adapter does not exist, is merged already, belongs to other masks, holds NaN or Inf, or cannot
            be merged; or the model is dense or offloaded.
    """
    if not isinstance(peft_model, PeftModel):
        raise TypeError(
            f"peft_model must be a peft.PeftModel, found {type(peft_model).__name__}: load the adapter with "
            "PeftModel.from_pretrained(base, adapter)"
        )
    if adapter_names is not None and (
        isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names)
    ):
        raise TypeError(f"adapter_names must be a list of names or None, found {adapter_names!r}")
    model = peft_model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"the base must be a transformers PreTrainedModel, found {type(model).__name__}")
    names = list(peft_model.active_adapters if adapter_names is None else dict.fromkeys(adapter_names))
    unknown = [name for name in names if name not in peft_model.peft_config]
    if unknown or not names:
        what = f"there is no adapter {unknown[0]!r}" if unknown else "no adapter is named or active"
        raise ValueError(f"adapter_names: {what}; the model has {', '.join(peft_model.peft_config)}")
    if not sparse_modules(model):
        raise ValueError("the base model is dense: peft_model.merge_and_unload() merges without a loss")
    _check_kind(peft_model, names)
    _check_layers(model, names)
    return names


def _check_layers(model: PreTrainedModel, names: list[str]) -> None:
    layers = adapted_layers(model, names)
    if not layers:
        raise ValueError("the model has no adapter layers: it was merged or unloaded before, or its adapter is empty")
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError(
                f"{path}: {', '.join(module.merged_adapters)} is merged into it already: "
                "peft_model.unmerge_adapter() takes it out"
            )
        if len(set(names) & set(getattr(module, "modules_to_save", None) or ())) > 1:
            raise ValueError(f"several of the adapters {', '.join(names)} replace {path} (modules_to_save)")
    for path, layer in layers.items():
        _check_layer(path, layer, names)


def _check_kind(peft_model: Any, names: list[str]) -> None:
    for name in names:
        config = peft_model.peft_config[name]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning or not hasattr(peft_model.base_model, "merge_and_unload"):
            raise ValueError(f"adapter {name!r} ({kind}) does not change weights and cannot be merged")
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError(f"adapter {name!r} (aLoRA) acts on some tokens only and cannot be merged")


def _check_layer(path: str, layer: Any, names: list[str]) -> None:
    base = layer.get_base_layer()
    if sparse_modules(base) and not isinstance(layer, SPARSE_LAYERS):
        raise ValueError(f"{path}: {type(layer).__name__} on {type(base).__name__} cannot be merged into its mask")
    if any(parameter.is_meta for parameter in layer.parameters()):
        raise ValueError(f"{path} is offloaded: load the base without device_map to merge (packed, it needs no GPU)")
    for name, parameter in layer.named_parameters():
        if set(names) & set(name.split(".")) and not bool(parameter.isfinite().all()):
            raise ValueError(f"{path}.{name} holds NaN or Inf: the adapter is broken, train it anew")
    for name in adapters_of(layer, names):
        if is_sparse(layer) and layer.refused_merges.get(name):
            raise ValueError(layer.refused_merges[name])
        if getattr(layer, "lora_bias", {}).get(name) and getattr(base, "bias", None) is None:
            raise ValueError(f"{path}: adapter {name!r} has a bias (lora_bias=True), the base layer has none")


def describe_adapters(peft_model: Any, names: list[str]) -> list[dict[str, Any]]:
    """Name, kind, base and main settings of adapters, for the report."""
    described = []
    for name in names:
        config = peft_model.peft_config[name].to_dict()
        entry: dict[str, Any] = {
            "name": name,
            "peft_type": str(getattr(config["peft_type"], "value", config["peft_type"])),
            "base_model": describe_source(config.get("base_model_name_or_path")),
        }
        settings = {key: config[key] for key in _SETTINGS if config.get(key) is not None}
        described.append(entry | {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()})
    return described


@contextmanager
def active(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Within it just the adapters `names` are active, wherever they are, and enabled; what trains stays as it is,
    unlike with PEFT's `set_adapter`."""
    modules: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [(module, module._active_adapter, module._disable_adapters) for module in modules]
    try:
        for module in modules:
            chosen = [name for name in names if name in module._get_available_adapters()]
            module._active_adapter = chosen[0] if len(chosen) == 1 else chosen
            module._disable_adapters = False
        yield
    finally:
        for module, adapter, disabled in before:
            module._active_adapter, module._disable_adapters = adapter, disabled
