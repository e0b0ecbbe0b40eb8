"""What `help` and `inspect.signature` say of functions of transformers that take more through this package."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

from ..config import SparsityConfig
from ..hub import is_ours, push_model
from ..runtime import RuntimeConfig

_FROM_PRETRAINED = """With optimum-ksparse:

    sparsity_config (`SparsityConfig` or `dict`, *optional*):
        Prunes the model while it is loaded, and puts `sparsity_report` on it. A sparse checkpoint loads without; what
        is passed for one must agree with what it was pruned with, except `batch_size` and `storage`.
        One whose weights hold NaN or infinity is refused, unless `KSPARSE_ALLOW_NONFINITE=1` is in the environment.
    runtime_config (`RuntimeConfig` or `dict`, *optional*):
        How the sparse layers of the loaded model compute; it is not saved.
"""
_PARAMETERS = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind | dict[str, Any] | None)
    for name, kind in (("sparsity_config", SparsityConfig), ("runtime_config", RuntimeConfig))
]


def describe_from_pretrained(function: Callable[..., Any]) -> None:
    """Adds `sparsity_config` and `runtime_config` to signature and docstring of a function that takes them."""
    describe(function, _PARAMETERS, _FROM_PRETRAINED)


def describe_auto_classes() -> None:
    """The same for the Auto classes, each of which has a copy of its own. They work as they did."""
    for name in modeling_auto.__all__:
        method = getattr(getattr(transformers, name, None), "from_pretrained", None)
        if name.startswith("AutoModel") and isinstance(method, MethodType):
            describe_from_pretrained(method.__func__)


def describe(function: Any, parameters: Iterable[inspect.Parameter], text: str) -> None:
    """Adds keyword arguments, and a text, to signature and docstring of a function, once; what is there stays."""
    if "__signature__" in vars(function):  # not that of a function that it is a copy of
        return
    signature = inspect.signature(function)
    known = list(signature.parameters.values())
    more = [parameter for parameter in parameters if parameter.name not in signature.parameters]
    place = len(known) - (known[-1].kind is inspect.Parameter.VAR_KEYWORD)
    function.__signature__ = signature.replace(parameters=[*known[:place], *more, *known[place:]])
    function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{text}"


_OF_PUSH = dict(list(inspect.signature(push_model).parameters.items())[1:])  # but the model


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
    describe(function, _OF_PUSH.values(), text)
