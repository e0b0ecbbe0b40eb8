"""PEFT on sparse modules, and merging that keeps the mask. PEFT is imported by what is taken from here, not by the
package."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from ..version import install_hint
from .report import MergedLayer, MergeReport

if TYPE_CHECKING:
    from .config import SparseLoraConfig
    from .merge import merge_adapter

_WITH_PEFT = {"SparseLoraConfig": "config", "merge_adapter": "merge"}  # name → its module, which imports PEFT


def prepare_for_training(model: PreTrainedModel, *, gradient_checkpointing: bool = True) -> PreTrainedModel:
    """Freezes a model, in place, before adapters are added: what `peft.prepare_model_for_kbit_training` is for.

    That one takes a sparse model for a quantized one of a method that it does not know, and casts all that is left in
    16 bit to float32, which doubles the memory of the weights: do not call it on a sparse model. Nothing is cast here.

    Args:
        model: a model of transformers, without adapters.
        gradient_checkpointing: keep the inputs of blocks only, and compute the blocks again in the backward pass.

    Returns:
        The same model: no parameter requires gradients. Its config, which is saved, stays as it is; transformers
        has no cache of keys and values where it keeps the inputs of blocks only.

    Raises:
        TypeError: `model` is not a model of transformers (PEFT's models are not: prepare the model inside first).
        ValueError: the model has adapters already, which would be frozen too, or no gradient checkpointing.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a model of transformers, found {type(model).__name__}; prepare it before get_peft_model"
        )
    if getattr(model, "peft_config", None):
        raise ValueError("the model has adapters already, which would be frozen too: prepare it before adding them")
    if gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise ValueError(f"{type(model).__name__} has no gradient checkpointing: pass gradient_checkpointing=False")
    model.requires_grad_(False)
    if gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def require_peft() -> None:
    """Raises ImportError, which names the extra to install, where PEFT is missing."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError(f"fine-tuning with adapters needs PEFT, which is not installed: {install_hint('finetune')}")


def __getattr__(name: str) -> Any:
    if name not in _WITH_PEFT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_peft()
    importlib.import_module("peft")  # first: when it is there, patches import modules of this room
    return getattr(importlib.import_module(f".{_WITH_PEFT[name]}", __name__), name)
