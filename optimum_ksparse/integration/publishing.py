"""The wrapper of `push_to_hub`: sparse models, and adapters on them, are published with their card."""

from __future__ import annotations

import functools
from typing import Any

from transformers.utils import PushToHubMixin

from ..hub import is_ours, push_model


def wrap_push_to_hub(cls: type[PushToHubMixin]) -> None:
    """Wraps `cls.push_to_hub` once. Signature and docstring stay; what it takes more for a sparse model is told by
    `push_model`. Other models, tokenizers and configs pass through."""
    original = cls.push_to_hub
    if getattr(original, "_ksparse", False):
        return

    @functools.wraps(original)
    def push_to_hub(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_ours(self):
            return original(self, *args, **kwargs)
        return push_model(self, *args, **kwargs)

    push_to_hub._ksparse = True  # type: ignore[attr-defined]
    cls.push_to_hub = push_to_hub  # type: ignore[method-assign]
