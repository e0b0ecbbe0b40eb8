"""The wrappers of `model.half()` and `model.float()`, which transformers refuses for any model with a quantizer: a
sparse model's weights have an ordinary dtype, and `model.to(dtype)` casts them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ..config import QUANT_METHOD


def wrap_casts(cls: type[PreTrainedModel]) -> None:
    """Wraps `cls.half` and `cls.float` once."""
    for name, dtype in (("half", torch.float16), ("float", torch.float32)):
        original = getattr(cls, name)
        if not getattr(original, "_ksparse", False):
            setattr(cls, name, _casting(original, dtype))


def _casting(original: Callable[..., PreTrainedModel], dtype: torch.dtype) -> Callable[..., PreTrainedModel]:
    @functools.wraps(original)
    def cast(self: PreTrainedModel, *args: object) -> PreTrainedModel:
        if getattr(self, "quantization_method", None) == QUANT_METHOD and not args:
            return self.to(dtype)  # type: ignore[arg-type]
        return original(self, *args)

    cast._ksparse = True  # type: ignore[attr-defined]
    return cast
