"""What `help` and `inspect.signature` say of functions of transformers that take more through this package."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from ..config import SparsityConfig
from ..hub import is_ours, push_model
from ..runtime import RuntimeConfig


def _loading(
    *,
    sparsity_config: SparsityConfig | dict[str, Any] | None = None,
    runtime_config: RuntimeConfig | dict[str, Any] | None = None,
) -> None:
    """With optimum-ksparse:

    sparsity_config (`SparsityConfig` or `dict`, *optional*):
        Prunes the model while it is loaded, and puts `sparsity_report` on it. A sparse checkpoint loads without; what
        is passed for one must agree with what it was pruned with, except `batch_size` and `storage`.
        One whose weights hold NaN or infinity is refused, unless `KSPARSE_ALLOW_NONFINITE=1` is in the environment.
    runtime_config (`RuntimeConfig` or `dict`, *optional*):
        How the sparse layers of the loaded model compute; it is not saved.
    """


def describe_functions() -> None:
    """Adds what they take more to signature and docstring of `from_pretrained`, of which each Auto class has a copy of
    its own, and of `push_to_hub`, of models."""
    for name in ("PreTrainedModel", *modeling_auto.__all__):
        method = getattr(getattr(transformers, name, None), "from_pretrained", None)
        if name.startswith(("AutoModel", "PreTrainedModel")) and isinstance(method, MethodType):
            _describe(method.__func__, _loading)
    _describe(PreTrainedModel.push_to_hub, push_model)


def _describe(function: Any, more: Callable[..., Any]) -> None:
    """Adds the keyword arguments and the text of `more` to signature and docstring of a function, once."""
    if "__signature__" in vars(function):  # not that of a function that it is a copy of
        return
    signature, added = inspect.signature(function), inspect.signature(more).parameters.values()
    ours = {p.name: p for p in added if p.kind is p.KEYWORD_ONLY}
    parameters = {**signature.parameters, **ours, **signature.parameters}
    function.__signature__ = signature.replace(parameters=sorted(parameters.values(), key=lambda p: p.kind))
    function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{inspect.getdoc(more)}\n"


def push_to_hub(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `push_to_hub`: a sparse model, or an adapter on one, is published by `push_model`, anything else as
    before."""

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (push_model if is_ours(self) else original)(self, *args, **kwargs)

    return wrapper
