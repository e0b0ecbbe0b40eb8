"""On what something was measured."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ..blocks.running import device_of
from ..kernels import product_dtype
from ..version import library_versions


def environment(model: PreTrainedModel, *libraries: str) -> dict[str, Any]:
    """`dtype` and `device` of a model, `product_dtype`, in which its products run there, and the `versions` of what
    computes with it."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "product_dtype": str(product_dtype(model.dtype, device_of(model))).removeprefix("torch."),
        "device": _device(model),
        "versions": library_versions("torch", "transformers", *libraries),
    }


def has_head(model: PreTrainedModel) -> bool:
    """Whether a model has a language model head."""
    return model.base_model is not model and model.get_output_embeddings() is not None


def check_causal_lm(model: Any) -> None:
    """Raises TypeError for what is not a causal LM of transformers."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, found {type(model).__name__}")
    if not has_head(model):
        raise TypeError(f"{type(model).__name__} has no language model head; load it with the class that has one")


def check_prepend_bos(setting: Any) -> bool | None:
    """`setting`, where it is True, False or None; otherwise TypeError."""
    if setting is not None and not isinstance(setting, bool):
        raise TypeError(f"prepend_bos must be True, False or None, found {setting!r}")
    return setting


def _device(model: PreTrainedModel) -> str:
    kinds = dict.fromkeys(p.device for p in model.parameters() if p.device.type != "meta")
    names = dict.fromkeys(
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type for device in kinds
    )
    return ", ".join(names) or "cpu"
