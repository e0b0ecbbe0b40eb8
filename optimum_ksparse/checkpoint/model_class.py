"""The class that a checkpoint is loaded with: the Auto class of transformers for what its config.json names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from ..data import find_file, hub_arguments

_NAMES = [name for name in modeling_auto.__all__ if name.startswith("AutoModel")]
# The first of them that leads to the class is taken, then any other. A class in two mappings, such as
# `Gemma3ForConditionalGeneration`, is first of all what it takes besides text.
_PREFERRED = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForMultimodalLM")
_GENERATING = {name: getattr(modeling_auto, name) for name in _PREFERRED if name in _NAMES}
# What `AutoModelForPreTraining` leads to, others do with a name that says more.
_AUTO_CLASSES = _GENERATING | {
    name: getattr(modeling_auto, name) for name in sorted(_NAMES, key="AutoModelForPreTraining".__eq__)
}


def class_for_source(source: str | os.PathLike[str], **loading: Any) -> Any:
    """The class to load a folder or a repository on the Hub with; for an adapter, its base model's.

    Args:
        loading: arguments of `from_pretrained`. Those that say where the files are, `gguf_file` and
            `trust_remote_code` are read; those that are None count as left out.

    Raises:
        OSError: there is no config.json. ValueError: it names no class that transformers knows.
    """
    names = ("gguf_file", "trust_remote_code", "code_revision")
    how = {name: loading[name] for name in names if loading.get(name) is not None} | hub_arguments(loading)
    config = AutoConfig.from_pretrained(_with_config(os.fspath(source), how), **how)
    return class_for_config(config, bool(how.get("trust_remote_code")))


def load_model(source: str | os.PathLike[str], **loading: Any) -> Any:
    """The model of a folder or a repository on the Hub, with an adapter on its base, by `class_for_source`; in its own
    dtype unless `loading`, arguments of `from_pretrained`, say otherwise. Those that are None count as left out."""
    how = {"dtype": "auto", **{name: value for name, value in loading.items() if value is not None}}
    return class_for_source(source, **how).from_pretrained(os.fspath(source), **how)


def class_for_config(config: PreTrainedConfig, trust_remote_code: bool = False) -> Any:
    """The Auto class that makes the class which a config names in `architectures`, and that class where none does. No
    other Auto class will do: that for causal LMs makes the text model alone of many vision-language models.

    Where the config names none, or one by a name of earlier days, its type decides.

    Raises:
        ValueError: transformers has neither a class of that name, nor one for that type.
    """
    names = config.architectures if isinstance(config.architectures, list | tuple) else []
    name = next((name for name in names if isinstance(name, str)), None)
    if trust_remote_code and (remote := _remote_class(config, name)):
        return remote
    if auto := next((auto for auto in _AUTO_CLASSES.values() if name in _classes(auto, config)), None):
        return auto
    model_class = getattr(transformers, name, None) if name else None
    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        return model_class
    if auto := next((auto for auto in _GENERATING.values() if _classes(auto, config)), None):
        return auto
    raise ValueError(
        f"transformers {transformers.__version__} has no class {name or 'of a language model'} for the type "
        f"{config.model_type!r} of {CONFIG_NAME}: upgrade it, or pass trust_remote_code where the model brings its "
        "code"
    )


def class_for_model(model: PreTrainedModel) -> Any:
    """The Auto class that makes a loaded model's own class, or that class."""
    kind = type(model)
    if isinstance(registered := getattr(kind, "_auto_class", None), str) and hasattr(transformers, registered):
        return getattr(transformers, registered)  # code that came with the model
    return next((auto for auto in _AUTO_CLASSES.values() if kind.__name__ in _classes(auto, model.config)), kind)


def _classes(auto: Any, config: PreTrainedConfig) -> list[str]:
    """Names of the classes that an Auto class may make of a config."""
    made = auto._model_mapping.get(type(config), ())
    return [kind.__name__ for kind in (made if isinstance(made, list | tuple) else (made,)) if kind is not None]


def _remote_class(config: PreTrainedConfig, name: str | None) -> Any:
    """The Auto class for code that comes with a model: `auto_map` holds `file.Class`, or `repository--file.Class`."""
    auto_map = getattr(config, "auto_map", None)
    if not isinstance(auto_map, Mapping):
        return None
    autos = [auto for auto in _AUTO_CLASSES if auto in auto_map]
    named = [auto for auto in autos if name is not None and str(auto_map[auto]).rpartition(".")[2] == name]
    return _AUTO_CLASSES[[*named, *autos][0]] if autos else None


def _with_config(source: str, loading: Mapping[str, Any]) -> str:
    """Where the config is: beside the weights, or with the base of an adapter, as `from_pretrained` finds it."""
    if loading.get("gguf_file") or os.path.isfile(os.path.join(source, loading.get("subfolder", ""), CONFIG_NAME)):
        return source
    path = find_file(source, ADAPTER_CONFIG_NAME, quiet=True, **loading)
    if path is None:
        return source
    config = json.loads(Path(path).read_text("utf-8"))
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return base if isinstance(base, str) and base else source
