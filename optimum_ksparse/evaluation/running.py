"""Running a model: on what, and its head on a part of the positions at a time."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..blocks import decoder_of
from ..blocks.running import device_of, replaced_forward, without_cache
from ..kernels import fast_products, product_dtype
from ..version import library_versions

# Logits held at a time: a vocabulary of 262,144 words and 512 positions would take half a gigabyte in float32.
_LOGITS_BYTES = 128 * 2**20

T = TypeVar("T")


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


def machine(device: torch.device) -> dict[str, Any]:
    """What a speed is measured on: the `machine`, by the name of its GPU or processor alone, and the `threads` with
    which torch computes there, None on a GPU."""
    if device.type == "cuda":
        return {"machine": torch.cuda.get_device_name(device), "threads": None}
    name = None
    with suppress(OSError):
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    known = platform.processor() or platform.machine() if name is None else name[1].strip()
    return {"machine": known, "threads": torch.get_num_threads()}


def check_causal_lm(model: Any) -> None:
    """Raises TypeError for what is not a causal LM of transformers."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, found {type(model).__name__}")
    if model.base_model is model or model.get_output_embeddings() is None:
        raise TypeError(f"{type(model).__name__} has no language model head; load it with the class that has one")


def map_logits(model: PreTrainedModel, ids: torch.Tensor, function: Callable[[slice, torch.Tensor], T]) -> list[T]:
    """What `function` makes of the logits of all positions but the last of token ids [batch, positions], part after
    part: it takes the part's place and its logits [batch, part, vocabulary] in the model's dtype."""
    with fast_products(model):
        output = model.base_model(input_ids=ids, **without_cache(model.base_model))
        return map_head(model, ids, output, function)


def map_head(
    model: PreTrainedModel, ids: torch.Tensor, output: ModelOutput, function: Callable[[slice, torch.Tensor], T]
) -> list[T]:
    """The same of the base's `output` for them."""
    chunk = max(1, _LOGITS_BYTES // (4 * model.get_output_embeddings().weight.shape[0] * len(ids)))
    outcomes = []
    # The model's own head, with all that it does to logits (soft caps, scales), runs on a part of the positions.
    with replaced_forward(bases_of(model), lambda _: lambda *args, **kwargs: hidden):
        for start in range(0, ids.shape[1] - 1, chunk):
            part = slice(start, min(start + chunk, ids.shape[1] - 1))
            hidden = type(output)(last_hidden_state=output[0][:, part])
            outcomes.append(function(part, model(input_ids=ids[:, part]).logits))
    return outcomes


def bases_of(model: PreTrainedModel) -> list[nn.Module]:
    """What the head may call: most call the base, and some, such as OPT's, the decoder inside it."""
    return list(dict.fromkeys((model.base_model, decoder_of(model))))
