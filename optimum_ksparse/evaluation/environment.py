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
    devices = dict.fromkeys(p.device for p in model.parameters() if p.device.type != "meta")
    names = (torch.cuda.get_device_name(each) if each.type == "cuda" else each.type for each in devices)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "product_dtype": str(product_dtype(model.dtype, device_of(model))).removeprefix("torch."),
        "device": ", ".join(dict.fromkeys(names)) or "cpu",
        "versions": library_versions("torch", "transformers", *libraries),
    }


def check_causal_lm(model: Any) -> None:
    """Raises TypeError for what is not a causal LM of transformers."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, found {type(model).__name__}")
    if model.base_model is model or model.get_output_embeddings() is None:
        raise TypeError(f"{type(model).__name__} has no language model head; load it with the class that has one")
