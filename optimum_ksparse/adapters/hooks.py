"""What functions of PEFT do more where a model has sparse modules: `integration.patches` puts these in their places,
and says why each is needed. Each takes the original and gives what calls it; models without sparse modules pass."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import HiraConfig, LoraConfig, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.hira.model import HiraModel
from torch import nn
from transformers.core_model_loading import WeightRenaming
from transformers.utils import ADAPTER_CONFIG_NAME, logging

from ..data import find_file
from ..nn import SparseLinear
from .config import with_mask
from .layers import SPARSE_LAYERS, SparseHiraLinear, SparseLoraLinear
from .masks import mask_digest, mismatch, read_record, record
from .targets import SPARSE, base_of, check_targets, targets_of_state

logger = logging.get_logger(__name__)


def _has_sparse(model: nn.Module) -> bool:
    return any(isinstance(module, SPARSE) for module in model.modules())


def inject_adapter(inject: Callable[..., None]) -> Callable[..., None]:
    """Refuses what cannot be, when the settings are complete and the model is not changed; then LoRA and HiRA wrap
    sparse layers in those of this package."""
    signature = inspect.signature(inject)

    @functools.wraps(inject)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs).arguments
        masked = getattr(self.peft_config[given["adapter_name"]], "masked", False)
        if not masked and not _has_sparse(given["model"]):
            return inject(self, *args, **kwargs)
        prepare, state_dict = self._prepare_model, given.get("state_dict")

        def prepare_model(config: PeftConfig, model: nn.Module) -> None:
            check_targets(self, config, model, None if state_dict is None else targets_of_state(config, state_dict))
            if isinstance(config, LoraConfig) and SparseLinear not in (config._custom_modules or {}):
                config._register_custom_module({SparseLinear: SparseLoraLinear})
            prepare(config, model)

        replaced: dict[str, Callable[..., Any]] = {"_prepare_model": prepare_model}
        if isinstance(self, HiraModel):
            replaced["_create_new_module"] = _create_hira_module
        vars(self).update(replaced)  # of this tuner alone, and for this call
        try:
            return inject(self, *args, **kwargs)
        finally:
            for name in replaced:
                del vars(self)[name]

    return wrapper


def _create_hira_module(config: HiraConfig, adapter_name: str, target: Any, **kwargs: Any) -> nn.Module:
    """HiRA has no `_register_custom_module`."""
    if isinstance(base_of(target), SparseLinear):
        return SparseHiraLinear(target, adapter_name, config=config, **kwargs)
    return HiraModel._create_new_module(config, adapter_name, target, **kwargs)


def config_of_settings(build: Callable[..., Any]) -> Callable[..., Any]:
    """Reads `masked` again, which `LoraConfig` does not know."""

    @functools.wraps(build)
    def from_peft_type(cls: type[PeftConfig], **settings: Any) -> PeftConfig:
        if settings.get("peft_type") != PeftType.LORA or "masked" not in settings:
            return build(cls, **settings)
        masked = settings.pop("masked")
        return with_mask(build(cls, **settings), masked)

    return from_peft_type


def save_pretrained(save: Callable[..., None]) -> Callable[..., None]:
    """Writes beside an adapter which masks it was trained over."""
    signature = inspect.signature(save)

    @functools.wraps(save)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        if given.arguments["is_main_process"] and mask_digest(self) is not None:
            for name in given.arguments["selected_adapters"] or list(self.peft_config):
                folder = Path(given.arguments["save_directory"])
                record(self, folder if name == "default" else folder / name)

    return wrapper


def load_adapter(load: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses the adapter of another model, and a masked one with settings that lost it; one that was trained over
    other masks is warned of, and its layers remember it when they are to be merged."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        if not _has_sparse(self):
            return result
        given = signature.bind(self, *args, **kwargs).arguments
        name, options = given["adapter_name"], given.get("kwargs", {})
        if self.peft_config[name].peft_type in (PeftType.LORA, PeftType.HIRA):
            _check_whole(result, self.peft_config[name].peft_type, name)
            _check_settings(self.peft_config[name], given["model_id"], name, options)
        why = mismatch(self, read_record(given["model_id"], **options), name)
        if why is not None:
            logger.warning(why)
        for layer in self.modules():
            if isinstance(layer, SPARSE_LAYERS) and name in layer._get_available_adapters():
                layer.refused_merges[name] = why
        return result

    return wrapper


def _check_whole(result: Any, kind: PeftType, name: str) -> None:
    """Raises ValueError, naming the first tensor, where an adapter's tensors are not those that this model needs."""
    prefix = f".{PEFT_TYPE_TO_PREFIX_MAPPING[kind]}"
    missing = [f"{key} is missing in the file" for key in result.missing_keys if prefix in key]
    unexpected = [f"{key} is in the file, not in this model" for key in result.unexpected_keys if prefix in key]
    if missing or unexpected:
        raise ValueError(
            f"adapter {name!r}: tensor {min(missing or unexpected)}: the adapter was made for another base model, or "
            "with other settings than its adapter_config.json has"
        )


def _check_settings(config: Any, source: Any, name: str, options: dict[str, Any]) -> None:
    """Raises ValueError where an adapter is masked, and its settings were read when PEFT could not know that."""
    path = None if hasattr(config, "masked") else find_file(source, ADAPTER_CONFIG_NAME, quiet=True, **options)
    if path is not None and json.loads(Path(path).read_text("utf-8")).get("masked"):
        raise ValueError(
            f"adapter {name!r} is masked, and its config= is a {type(config).__name__}, which does not say so: leave "
            "config= out, or import optimum_ksparse before its settings are read"
        )


def count_parameters(count: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int]]:
    """Counts a sparse layer's zeros too in the second number, of all parameters."""

    @functools.wraps(count)
    def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
        trainable, total = count(self)
        sparse = (module for module in self.modules() if isinstance(module, SPARSE))
        return trainable, total + sum(module.shape.numel() - module.weight.numel() for module in sparse)

    return get_nb_trainable_parameters


def rename_magnitudes(build: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Renames the magnitudes of DoRA, which `load_adapter` of a model of transformers, sparse or not, leaves as they
    were before training (PEFT 0.21.2)."""

    @functools.wraps(build)
    def build_peft_weight_mapping(conversions: Any, adapter_name: str, peft_config: Any = None) -> list[Any]:
        mapping = build(conversions, adapter_name, peft_config=peft_config)
        if mapping and getattr(peft_config, "use_dora", False):
            magnitudes = rf"(lora_magnitude_vector\.{re.escape(adapter_name)})$"
            mapping.append(WeightRenaming(magnitudes, r"\1.weight"))
        return mapping

    return build_peft_weight_mapping


def keys_of_hotswap(keys: dict[PeftType, list[str]]) -> dict[PeftType, list[str]]:
    """Keeps an adapter from taking the place of one that computes in another way."""
    return {**keys, PeftType.LORA: [*keys[PeftType.LORA], "masked"]}
