"""Where PEFT is extended: its dispatch, its check of targets, its configs, its loading and its counts."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftMixedModel, PeftModel, PeftType, peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.hira.model import HiraModel
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_peft_model_state_dict, hotswap
from peft.utils import transformers_weight_conversion as conversion
from torch import nn
from transformers.core_model_loading import WeightRenaming

from ..checkpoint.staging import recover
from ..nn import SparseLinear
from . import masks
from .config import SparseLoraConfig, with_mask
from .layers import SparseHiraLinear, SparseLoraLinear
from .targets import SPARSE, base_of, check_targets, targets_of_state

_applied = False


def apply() -> None:
    """Extends PEFT; a second call does nothing.

    Raises:
        AttributeError: this PEFT lacks what is to be extended; then nothing of it is.
    """
    global _applied
    if _applied:
        return
    extended: list[tuple[Any, str, Any]] = [
        *masks.changes(PeftModel, BaseTuner),
        (LoraModel, "_create_new_module", staticmethod(_with_layer(LoraModel._create_new_module, SparseLoraLinear))),
        (HiraModel, "_create_new_module", staticmethod(_with_layer(HiraModel._create_new_module, SparseHiraLinear))),
        (BaseTuner, "inject_adapter", _with_check(BaseTuner.inject_adapter)),
        (PeftModel, "from_pretrained", classmethod(_with_masked_config(PeftModel.from_pretrained.__func__))),  # type: ignore[attr-defined]
        (conversion, "build_peft_weight_mapping", _with_magnitudes(conversion.build_peft_weight_mapping)),
        (peft_model, "set_peft_model_state_dict", _with_whole_state(peft_model.set_peft_model_state_dict)),
    ]
    for kind in (PeftModel, PeftMixedModel):
        counted = _with_logical_weights(kind.get_nb_trainable_parameters)
        extended.append((kind, "get_nb_trainable_parameters", counted))
    swapped = hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA]
    for owner, name, value in extended:
        setattr(owner, name, value)
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = SparseLoraConfig
    swapped.append("masked")  # an adapter does not take the place of one that computes in another way
    _applied = True


def _has_sparse(model: nn.Module) -> bool:
    return any(isinstance(module, SPARSE) for module in model.modules())


def _with_layer(create: Callable[..., nn.Module], layer: type[nn.Module]) -> Callable[..., nn.Module]:
    """`_create_new_module` that makes `layer` where the target is sparse."""

    @functools.wraps(create)
    def create_new_module(config: PeftConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        custom = tuple(getattr(config, "_custom_modules", None) or ())
        if not isinstance(base_of(target), SparseLinear) or isinstance(base_of(target), custom):
            return create(config, adapter_name, target, **kwargs)
        if isinstance(target, BaseTunerLayer):
            raise TypeError(f"a sparse layer has adapters of {type(target).__name__} already: it takes one kind only")
        return layer(target, adapter_name, config=config, **kwargs)

    return create_new_module


def _with_check(inject: Callable[..., None]) -> Callable[..., None]:
    """`inject_adapter` that refuses what cannot be, when the settings are complete and the model is not changed."""
    signature = inspect.signature(inject)

    @functools.wraps(inject)
    def inject_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        state_dict = signature.bind(self, *args, **kwargs).arguments.get("state_dict")
        prepare = self._prepare_model

        def checked(config: PeftConfig, model: nn.Module) -> None:
            names = None if state_dict is None else targets_of_state(config, set(state_dict))
            check_targets(self, config, model, names)
            prepare(config, model)

        self._prepare_model = checked
        try:
            inject(self, *args, **kwargs)
        finally:
            del self._prepare_model

    return inject_adapter


def _with_logical_weights(count: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int]]:
    """`get_nb_trainable_parameters` whose second number counts a sparse layer's zeros too, as its name says."""

    @functools.wraps(count)
    def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
        trainable, total = count(self)
        sparse = [module for module in self.modules() if isinstance(module, SPARSE)]
        zeros = sum(module.dense_bytes // module.weight.element_size() - module.weight.numel() for module in sparse)
        return trainable, total + zeros

    return get_nb_trainable_parameters


def _with_masked_config(load: Callable[..., PeftModel]) -> Callable[..., PeftModel]:
    """`PeftModel.from_pretrained` that puts right what a save that was cut off has left, and reads `masked` again.
    `AutoPeftModel` passes settings that it has read before it made the model, when PEFT may not have been extended."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def from_pretrained(cls: type[PeftModel], *args: Any, **kwargs: Any) -> PeftModel:
        bound = signature.bind(cls, *args, **kwargs)
        recover(Path(bound.arguments["model_id"], bound.arguments.get("kwargs", {}).get("subfolder") or ""))
        config = bound.arguments.get("config")
        if type(config) is LoraConfig and _has_sparse(bound.arguments["model"]):
            options = bound.arguments.get("kwargs", {})
            read = PeftConfig.from_pretrained(bound.arguments["model_id"], **options)
            if getattr(read, "masked", False):
                bound.arguments["config"] = with_mask(config, True)
        return load(*bound.args, **bound.kwargs)

    return from_pretrained


def _with_magnitudes(build: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """`build_peft_weight_mapping` that knows the magnitudes of DoRA, without which `load_adapter` of a model of
    transformers leaves them as they were before training (PEFT 0.21.2)."""

    @functools.wraps(build)
    def build_peft_weight_mapping(conversions: Any, adapter_name: str, peft_config: Any = None) -> list[Any]:
        mapping = build(conversions, adapter_name, peft_config=peft_config)
        if mapping and getattr(peft_config, "use_dora", False):
            found = rf"(lora_magnitude_vector\.{re.escape(adapter_name)})$"
            mapping.append(WeightRenaming(found, r"\1.weight"))
        return mapping

    return build_peft_weight_mapping


def _with_whole_state(load: Callable[..., Any]) -> Callable[..., Any]:
    """`set_peft_model_state_dict` that, for a sparse model, refuses an adapter of another one."""

    @functools.wraps(load)
    def set_peft_model_state_dict(
        model: Any,
        peft_model_state_dict: Mapping[str, torch.Tensor],
        adapter_name: str = "default",
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        if _has_sparse(model) and not ignore_mismatched_sizes:
            _check_state(model, peft_model_state_dict, adapter_name)
        return load(
            model,
            peft_model_state_dict,
            adapter_name=adapter_name,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            **kwargs,
        )

    return set_peft_model_state_dict


def _check_state(model: Any, state: Mapping[str, torch.Tensor], adapter_name: str) -> None:
    """Raises ValueError, naming the first tensor, where an adapter's tensors are not those of this model."""
    config = model.peft_config.get(adapter_name)  # X-LoRA loads adapters that it does not name
    kind = None if config is None else config.peft_type
    if kind not in (PeftType.LORA, PeftType.HIRA):
        return
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[kind]
    own = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    needed = {key: tuple(tensor.shape) for key, tensor in own.items() if f".{prefix}" in key}
    found = {key: tuple(tensor.shape) for key, tensor in state.items() if f".{prefix}" in key}
    why = "the adapter was made for another base model, or with other settings than its adapter_config.json has"
    for key in sorted(needed | found):
        if needed.get(key) != found.get(key):
            missing = "no such tensor"
            raise ValueError(
                f"adapter {adapter_name!r}: tensor {key} is {list(found[key]) if key in found else missing} in the "
                f"file, this model needs {list(needed[key]) if key in needed else missing}: {why}"
            )
