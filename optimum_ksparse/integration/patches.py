"""What of other libraries is replaced: all that neither they nor Python let be done otherwise."""

from __future__ import annotations

import importlib
import inspect
from functools import reduce
from typing import Any, NamedTuple

from transformers.utils import logging

from optimum_ksparse_autoload import when_imported

logger = logging.get_logger(__name__)


class Patch(NamedTuple):
    """A replaced name.

    Attributes:
        target: module and name of what is replaced; what inherits or copies it has it too.
        wrapper: module of this package and name of a function that takes the original and gives its replacement.
        reason: why there is no other way.
    """

    target: str
    wrapper: str
    reason: str


PATCHES = (
    Patch(
        "torch.nn.modules.module:Module.requires_grad_",
        "nn.packed:requires_grad_",
        "it asks none of the modules in a model, and torch's error names neither the layer nor what to do",
    ),
    Patch(
        "transformers.modeling_utils:PreTrainedModel.from_pretrained",
        "integration.loading:from_pretrained",
        "dense storage has no quantizer, and no hook of a quantizer is told where on the Hub a model is read",
    ),
    Patch(
        "transformers.modeling_utils:PreTrainedModel.save_pretrained",
        "integration.saving:save_pretrained",
        "the hook of quantizers gives a state dict, before a file is written: nothing comes after, and nothing before",
    ),
    Patch(
        "transformers.utils.hub:PushToHubMixin.push_to_hub",
        "integration.describing:push_to_hub",
        "transformers writes a card of its own after save_pretrained; that of PEFT's models ends here too",
    ),
    Patch(
        "transformers.configuration_utils:PreTrainedConfig.get_config_dict",
        "integration.source:reading_config",
        "a save that was cut off is put right before files are read, and what keeps others out of packed weights goes",
    ),
    *(
        Patch(target, "integration.source:reading", "a save that was cut off is put right before files are read")
        for target in (
            "transformers.models.auto.tokenization_auto:AutoTokenizer.from_pretrained",
            "transformers.tokenization_utils_base:PreTrainedTokenizerBase.from_pretrained",
            "peft.config:PeftConfigMixin.from_pretrained",
            "peft.config:PeftConfigMixin._get_peft_type",
        )
    ),
    Patch(
        "transformers.trainer:Trainer.__init__",
        "integration.training:recording",
        "callbacks that every Trainer has cannot be registered, and its card has no callback",
    ),
    Patch(
        "peft.tuners.tuners_utils:BaseTuner.inject_adapter",
        "adapters.hooks:inject_adapter",
        "LoRA takes layers config by config, HiRA none; no tuner lets another refuse before it changes the model",
    ),
    Patch(
        "peft.config:PeftConfigMixin.from_peft_type",
        "adapters.hooks:config_of_settings",
        "a file of settings cannot name its class, and PEFT drops the ones that LoraConfig does not know",
    ),
    Patch(
        "peft.peft_model:PeftModel.save_pretrained",
        "adapters.hooks:save_pretrained",
        "nothing is called when an adapter is saved, which has to say over which masks it was trained",
    ),
    Patch(
        "peft.peft_model:PeftModel.load_adapter",
        "adapters.hooks:load_adapter",
        "layers are not told what they are loaded from, and PEFT merely warns of missing tensors",
    ),
    Patch(
        "peft.peft_model:PeftModel.get_nb_trainable_parameters",
        "adapters.hooks:count_parameters",
        "it counts what is stored, except for one class of bitsandbytes that it knows by name",
    ),
    Patch(
        "peft.utils.transformers_weight_conversion:build_peft_weight_mapping",
        "adapters.hooks:rename_magnitudes",
        "PEFT 0.21.2 leaves DoRA's magnitudes untrained when a model of transformers loads an adapter",
    ),
    Patch(
        "peft.utils.hotswap:CONFIG_KEYS_TO_CHECK",
        "adapters.hooks:keys_of_hotswap",
        "otherwise an adapter takes the place of a masked one and is computed as masked",
    ),
)
# Importing these takes long, and most programs never do: they are patched when somebody has imported them.
_LATER = ("peft", "transformers.trainer")
_applied: set[str] = set()
_awaited: set[str] = set()


def apply_patches() -> None:
    """Puts all replacements in their places, once: now, or when their library is imported."""
    _apply(None)
    for library in set(_LATER) - _awaited:
        _awaited.add(library)
        when_imported(library, lambda module: _apply(module.__name__))


def _library(patch: Patch) -> str | None:
    return next((name for name in _LATER if patch.target.startswith((f"{name}.", f"{name}:"))), None)


def _apply(library: str | None) -> None:
    patches = [patch for patch in PATCHES if _library(patch) == library and patch.target not in _applied]
    try:
        replacements = [_replacement(patch) for patch in patches]
    except (ImportError, AttributeError, KeyError) as error:
        if library != "peft":
            raise
        logger.warning_once(f"The PEFT that is installed cannot adapt sparse layers: {error}")
        return
    for owner, name, value in replacements:
        setattr(owner, name, value)
    _applied.update(patch.target for patch in patches)


def _replacement(patch: Patch) -> tuple[Any, str, Any]:
    """What to assign: owner, name, value. Raises AttributeError where the library has no such name (any more)."""
    owner, name, original = find(patch.target)
    room, _, wrapper = patch.wrapper.partition(":")
    wrap = getattr(importlib.import_module(f"..{room}", __package__), wrapper)
    if isinstance(original, classmethod):
        return owner, name, classmethod(wrap(original.__func__))
    return owner, name, wrap(original)


def find(target: str) -> tuple[Any, str, Any]:
    """Owner, name and value of a target, as the owner's `__dict__` holds it."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = reduce(getattr, owners, importlib.import_module(module))
    return owner, name, inspect.getattr_static(owner, name)
