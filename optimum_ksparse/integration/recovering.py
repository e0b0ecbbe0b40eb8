"""Before a checkpoint is read: what a save into its folder that was cut off has left is put right."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from ..checkpoint.staging import recover


def recover_source(source: Any, subfolder: str | None = None) -> None:
    """Of what `from_pretrained` is asked to read, where it is a folder."""
    if isinstance(source, str | os.PathLike) and os.path.isdir(source):
        recover(os.path.join(source, subfolder or ""))


def reading(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of a class method that reads a folder: configs, with which models begin, tokenizers, settings of adapters."""

    @functools.wraps(original)
    def read(cls: type, source: Any = None, *args: Any, **kwargs: Any) -> Any:
        source = kwargs.pop("pretrained_model_name_or_path", source)
        recover_source(source, kwargs.get("subfolder"))
        return original(cls, source, *args, **kwargs)

    return read
