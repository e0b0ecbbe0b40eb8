"""The wrapper of `push_to_hub`: sparse models, and adapters on them, are published with their card."""

from __future__ import annotations

import difflib
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
        _check_names(kwargs)
        return push_model(self, *args, **kwargs)

    describe_push_to_hub(wrapper)
    return wrapper


def describe_push_to_hub(function: Callable[..., Any]) -> None:
    """Adds what `push_model` takes to signature and docstring of a `push_to_hub`."""
    text = f"Of a sparse model, or an adapter on one, with optimum-ksparse:\n\n{inspect.getdoc(push_model)}\n"
    describe(function, _PARAMETERS.values(), text)


def _check_names(arguments: dict[str, Any]) -> None:
    """Raises TypeError for an argument that there is not, and names the nearest one."""
    for name in arguments:
        if name not in _PARAMETERS:
            near = difflib.get_close_matches(name, _PARAMETERS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(_PARAMETERS)}"
            raise TypeError(f"push_to_hub() got an unexpected keyword argument {name!r}{hint}")
