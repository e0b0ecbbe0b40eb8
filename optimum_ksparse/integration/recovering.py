"""Before a checkpoint is read: what a save into its folder that was cut off has left is put right."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from ..staging import recover


def recover_source(source: Any, kwargs: Mapping[str, Any]) -> None:
    """Of the folder that `from_pretrained` is asked to read, and of the adapter's, where it is one."""
    adapter = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path")
    for folder in (source, adapter):
        if isinstance(folder, str | os.PathLike) and os.path.isdir(folder):
            recover(os.path.join(folder, kwargs.get("subfolder") or ""))


def wrap_get_config_dict(cls: type[PreTrainedConfig]) -> None:
    """Wraps `cls.get_config_dict` once, with which Auto classes read a config before they call a model's class."""
    original = cls.get_config_dict.__func__  # type: ignore[attr-defined]
    if getattr(original, "_ksparse", False):
        return

    @functools.wraps(original)
    def get_config_dict(cls: type[PreTrainedConfig], pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        recover_source(pretrained_model_name_or_path, kwargs)
        return original(cls, pretrained_model_name_or_path, **kwargs)

    get_config_dict._ksparse = True  # type: ignore[attr-defined]
    cls.get_config_dict = classmethod(get_config_dict)  # type: ignore[assignment]
