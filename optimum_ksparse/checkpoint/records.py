"""What a model's config says of how it was made, and where it was loaded from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from optimum_ksparse_autoload import GUARD

from ..blocks import decoder_of
from ..config import DENSE_CONFIG_KEY, MODULE_NAMES, QUANT_METHOD, SparsityConfig
from ..records import describe_source
from .facts import facts_of
from .modules import sparse_modules, stored_name

# transformers reads the name of the weight file from this entry of `config.json`, if it is there. What is no such name
# stops it, with a message that ends in it, even where `ignore_mismatched_sizes` would make random weights of packed
# ones. This package takes it out of what is read. A checkpoint keeps it for good, and an install command may change:
# that stands in the card.
_WEIGHTS_ENTRY = "transformers_weights"
_GUARD = f"{GUARD} the package {QUANT_METHOD}: its README, or the model's card, says how to install it"


def made_with(model: PreTrainedModel) -> SparsityConfig | None:
    """The settings with which a sparse model was made; None for any other."""
    settings = getattr(model.config, "quantization_config", None)
    return settings if isinstance(settings, SparsityConfig) else None


def is_dense_record(settings: Any) -> bool:
    """Whether settings, as a `config.json` keeps them, are those of a dense model from which an earlier version has
    merely dropped blocks: one as any other."""
    return isinstance(settings, Mapping) and bool(settings.get("drop_layers")) and settings.get("pattern", "") is None


def is_our_record(settings: Any) -> bool:
    """Whether settings in a config are those of this package."""
    return isinstance(settings, SparsityConfig) or (
        isinstance(settings, Mapping) and settings.get("quant_method") == QUANT_METHOD
    )


def layer_records(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """What `config.json` says of each sparse layer: path in the decoder → pattern and number of values."""
    return {
        stored_name(name): {"pattern": str(module.pattern), "num_values": module.num_values}
        for name, module in sparse_modules(decoder_of(model)).items()
    }


def record_layers(model: PreTrainedModel, config: SparsityConfig) -> None:
    """Writes into `config` what loading must know of the sparse layers before it reads a tensor."""
    config.layers, config.names = layer_records(model), MODULE_NAMES


def guard_packed(folder: Path, config: PreTrainedConfig) -> None:
    """Lets no transformers without this package read the packed weights in `folder`; the error names the package. The
    part of a config that a text model alone reads is guarded too.

    Args:
        config: that lies in `folder`.
    """
    path = folder / CONFIG_NAME
    settings = json.loads(path.read_text("utf-8"))
    text = config.get_text_config(decoder=True)
    parts = (settings[name] for name in config.sub_configs if name in settings and getattr(config, name) is text)
    for part in (settings, *parts):
        part[_WEIGHTS_ENTRY] = _GUARD
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def drop_guard(settings: dict[str, Any]) -> None:
    """Takes out of what a `config.json` holds, or the attributes of a config, what `guard_packed` put there."""
    for part in (settings, *settings.values()):
        values = vars(part) if isinstance(part, PreTrainedConfig) else part
        if isinstance(values, dict) and str(values.get(_WEIGHTS_ENTRY)).startswith(GUARD):
            del values[_WEIGHTS_ENTRY]


@contextmanager
def without_record(config: PreTrainedConfig) -> Iterator[None]:
    """Within it a config says of no weights that they are sparse: for a dense model that was made anew from the config
    of a sparse one."""
    dropped = drop_record(config)
    try:
        yield
    finally:
        for part, key, settings in dropped:
            setattr(part, key, settings)


def drop_record(config: PreTrainedConfig) -> list[tuple[PreTrainedConfig, str, Any]]:
    """Takes out of a config, and its parts, what says that weights are sparse; gives where it was."""
    parts = [part for name in config.sub_configs if (part := getattr(config, name, None)) is not None]
    dropped = []
    for part in (config, *parts):
        for key in ("quantization_config", DENSE_CONFIG_KEY):
            settings = getattr(part, key, None)
            if is_our_record(settings):
                dropped.append((part, key, settings))
                delattr(part, key)
    return dropped


def describe_model(model: PreTrainedModel) -> str | None:
    """Where a model was loaded from, as a report or a card may name it: a local folder by its last part."""
    name = model.name_or_path
    # Noted when it was loaded: from elsewhere a relative path reads like a name on the Hub.
    if name and facts_of(model).folder is not None:
        return os.path.basename(os.path.normpath(name))
    return describe_source(name)
