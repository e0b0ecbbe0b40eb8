"""The wrapper of `push_to_hub`: sparse models, and adapters on them, are published with their card."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import PushToHubMixin

from ..checkpoint import has_lost_blocks, sparse_modules
from ..hub import is_adapter, push_model, without_peft


def wrap_push_to_hub(cls: type[PushToHubMixin]) -> None:
    """Wraps `cls.push_to_hub` once. Signature and docstring stay; what it takes more for a sparse model is told by
    `push_model`. Other models, tokenizers and configs pass through."""
    original = cls.push_to_hub
    if getattr(original, "_ksparse", False):
        return

    @functools.wraps(original)
    def push_to_hub(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_ours(self):
            return original(self, *args, **kwargs)
        return push_model(self, *args, **kwargs)

    push_to_hub._ksparse = True  # type: ignore[attr-defined]
    cls.push_to_hub = push_to_hub  # type: ignore[method-assign]


def _is_ours(model: Any) -> bool:
    """Whether it is a sparse model, an adapter on one, or a dense model that has lost blocks."""
    plain = without_peft(model)
    if not isinstance(plain, PreTrainedModel):
        return False
    return bool(sparse_modules(plain)) or (not is_adapter(model) and has_lost_blocks(plain))
