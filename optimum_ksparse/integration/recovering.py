"""Before a checkpoint is read: what a save into its folder that was cut off has left is put right."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

from ..checkpoint.staging import recover


def recover_source(source: Any, kwargs: Mapping[str, Any]) -> None:
    """Of the folder that `from_pretrained` is asked to read, and of the adapter's, where it is one."""
    adapter = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path")
    for folder in (source, adapter):
        if isinstance(folder, str | os.PathLike) and os.path.isdir(folder):
            recover(os.path.join(folder, kwargs.get("subfolder") or ""))


def wrap_reader(cls: type, name: str) -> None:
    """Wraps a class method once that reads a folder without the model's `from_pretrained`, or before it: configs, with
    which Auto classes begin, and tokenizers."""
    original = getattr(cls, name).__func__
    if getattr(original, "_ksparse", False):
        return

    @functools.wraps(original)
    def read(cls: type, source: Any = None, *args: Any, **kwargs: Any) -> Any:
        source = kwargs.pop("pretrained_model_name_or_path", source)
        recover_source(source, kwargs)
        return original(cls, source, *args, **kwargs)

    read._ksparse = True  # type: ignore[attr-defined]
    setattr(cls, name, classmethod(read))
