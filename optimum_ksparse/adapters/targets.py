"""Which sparse modules an adapter would wrap, and whether it can."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.hira.layer import HiraLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn

from ..nn import SparseExperts, SparseLinear
from .config import lora_variants

SPARSE = (SparseLinear, SparseExperts)
_LAYERS = {PeftType.LORA: LoraLayer, PeftType.HIRA: HiraLayer}
SUPPORTED = (
    "supported on sparse layers are LoRA (with rsLoRA, DoRA, aLoRA, VeLoRA, or masked) and HiRA; every tuner may "
    "still target modules that are dense"
)
# Of LoRA: the variants that work over a packed weight, and the initialisations that need its dense form.
_VARIANTS = {"use_dora", "alora_invocation_tokens", "velora_config"}
_DENSE_INITS = ("pissa", "corda", "olora", "loftq", "lora_ga", "mica")


def base_of(module: Any) -> Any:
    """The module that an adapter's layer wraps, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _sparse_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names, in the model with its adapters, and sparse modules or what wraps them."""
    wrapped: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(wrapped):
            continue
        if isinstance(module, BaseTunerLayer):
            wrapped = (*wrapped, f"{name}.")
        if isinstance(base_of(module), SPARSE):
            yield name, module


def check_targets(tuner: BaseTuner, config: Any, model: nn.Module, names: set[str] | None = None) -> None:
    """Checks, before anything is changed, that a tuner can wrap the sparse modules that it targets.

    Args:
        tuner: says which modules it targets.
        config: its settings, after PEFT has filled in the defaults of the model.
        model: the one to adapt.
        names: of the targeted modules, where the state dict of an adapter says which these are.

    Raises:
        TypeError: the tuner cannot wrap a sparse module, which is named.
        ValueError: settings of LoRA cannot; the delta is to be masked and no target is sparse; or quantised values
            were to be trained.
    """
    config = _maybe_include_all_linear_layers(copy.copy(config), model)
    targeted = False
    for name, module in _sparse_modules(model):
        _check_whole(config, name, base_of(module).values)
        parameter = _targeted_parameter(config, name)
        if parameter or (name in names if names is not None else tuner._check_target_module_exists(config, name)):
            _check(config, name, module, parameter)
            targeted = True
    if getattr(config, "masked", False) and not targeted:
        raise ValueError(
            "masked=True, but no sparse layer is targeted, whose mask it needs: load a sparse model, or one in dense "
            f"storage after importing optimum_ksparse; target_modules is {config.target_modules!r}"
        )


def targets_of_state(config: Any, keys: Iterable[str]) -> set[str]:
    """Names of the modules that the state dict of an adapter has tensors of."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    return {key.rsplit(f".{prefix}", 1)[0].removeprefix("_orig_mod.") for key in keys}


def _targeted_parameter(config: Any, name: str) -> str | None:
    """The entry of `target_parameters` that means a sparse module, or the parameter that it stands for."""
    for target in getattr(config, "target_parameters", None) or []:
        if any(path == target or path.endswith(f".{target}") for path in (name, f"{name}.weight")):
            return str(target)
    return None


def _check_whole(config: Any, name: str, values: str | None) -> None:
    """Raises ValueError where a module is to be trained as a whole, and its values are integers."""
    saved = getattr(config, "modules_to_save", None) or []
    if values is not None and any(f".{module}." in f".{name}." for module in saved):
        raise ValueError(
            f"modules_to_save={saved!r} has {name}, whose values are {values}, which cannot be trained: take it out, "
            "or call model.dequantize_values() before"
        )


def _check(config: Any, name: str, module: nn.Module, parameter: str | None) -> None:
    kind, tuner = type(base_of(module)).__name__, f"{config.peft_type.value} ({type(config).__name__})"
    if config.peft_type not in _LAYERS:
        raise TypeError(f"{tuner} cannot adapt {name}, which is a sparse layer ({kind}): {SUPPORTED}")
    if parameter is not None:
        raise TypeError(f"target_parameters={parameter!r} of {tuner} is {name}, a {kind} without a dense parameter")
    if not isinstance(base_of(module), SparseLinear):
        raise TypeError(f"{tuner} cannot adapt {name}, a {kind}: {SUPPORTED}, which are SparseLinear modules only")
    if isinstance(module, BaseTunerLayer) and not isinstance(module, _LAYERS[config.peft_type]):
        raise TypeError(f"{name} has adapters of {type(module).__name__} already: it takes one kind only")
    if isinstance(config, LoraConfig):
        _check_lora(config, name, base_of(module).values)


def _check_lora(config: LoraConfig, name: str, values: str | None) -> None:
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_DENSE_INITS):
        raise ValueError(
            f"init_lora_weights={init!r} changes the dense weight of {name}, which is a sparse layer: it would fill "
            "zeros; on sparse layers use True, 'gaussian', 'orthogonal' or 'eva'"
        )
    variants = lora_variants(config)
    refused = [variant for variant in variants if variant not in _VARIANTS | {"target_parameters"}]
    if refused:
        raise ValueError(f"LoRA with {', '.join(refused)} cannot adapt {name}, which is a sparse layer: {SUPPORTED}")
    if "velora_config" in variants and values is not None:
        raise ValueError(
            f"LoRA with velora_config cannot adapt {name}, whose values are {values}: leave it out, or call "
            "model.dequantize_values() before"
        )
