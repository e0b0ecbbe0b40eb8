"""The wrapper of `push_to_hub`: sparse models, and adapters on them, are published with their card."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from ..hub import is_ours, push_model
from .describing import describe

_PARAMETERS = dict(list(inspect.signature(push_model).parameters.items())[1:])  # but the model


def push_to_hub(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of a model; signature and docstring tell what it takes more for a sparse model. Other models, tokenizers and
    configs pass through."""

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_ours(self):
            return original(self, *args, **kwargs)
        return push_model(self, *args, **kwargs)

    describe_push_to_hub(wrapper)
    return wrapper


def describe_push_to_hub(function: Callable[..., Any]) -> None:
    """Adds what `push_model` takes to signature and docstring of a `push_to_hub`."""
    text = f"Of a sparse model, or an adapter on one, with optimum-ksparse:\n\n{inspect.getdoc(push_model)}\n"
    describe(function, _PARAMETERS.values(), text)
