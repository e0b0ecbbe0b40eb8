"""The language model head on a part of the positions: the logits of all of them may fill the memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..blocks import decoder_of
from ..kernels import fast_products

# Logits held at a time: a vocabulary of 262,144 words and 512 positions would take half a gigabyte in float32.
_LOGITS_BYTES = 128 * 2**20

T = TypeVar("T")


def run_base(model: PreTrainedModel, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> ModelOutput:
    """What the model without its head makes of token ids [batch, positions]; its first part are the hidden states
    [batch, positions, hidden]. No cache is built. Rows padded on the right need a mask [batch, positions]."""
    taken = inspect.signature(model.base_model.forward).parameters.keys()
    arguments: dict[str, Any] = {"use_cache": False} if taken & {"use_cache", "kwargs"} else {}
    if attention_mask is not None and taken & {"attention_mask", "kwargs"}:
        arguments["attention_mask"] = attention_mask
    with fast_products(model):
        return model.base_model(input_ids=ids, **arguments)


def map_logits(
    model: PreTrainedModel,
    output: ModelOutput,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    function: Callable[[slice, torch.Tensor], T],
) -> list[T]:
    """What `function` makes of the logits of a part of the positions, part after part.

    Args:
        output: of `run_base`. hidden: those of its hidden states to take, [batch, positions, hidden].
        ids: their tokens, [batch, positions].
        function: takes the part's place among the positions and its logits [batch, part, vocabulary] in the model's
            dtype.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    chunk = max(1, _LOGITS_BYTES // (4 * vocabulary * len(ids)))
    found = []
    with fast_products(model), frozen_base(model, type(output)) as set_hidden:
        for start in range(0, ids.shape[1], chunk):
            part = slice(start, start + chunk)
            set_hidden(hidden[:, part])
            found.append(function(part, model(input_ids=ids[:, part]).logits))
    return found


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids belong: on the device of the first parameter that is not offloaded."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


@contextmanager
def frozen_base(model: PreTrainedModel, kind: type[ModelOutput]) -> Iterator[Callable[[torch.Tensor], None]]:
    """Within it the model's base returns given hidden states in an output of its own `kind`, so that the model's own
    head, with all that it does to logits (soft caps, scales), runs on a part of the positions at a time."""
    # Most heads call the base, and some, such as OPT's, the decoder inside it.
    frozen = [model.base_model, *([decoder] if (decoder := decoder_of(model)) is not model.base_model else [])]
    own = [vars(module).get("forward") for module in frozen]
    current: list[torch.Tensor] = []

    def forward(*args: Any, **kwargs: Any) -> ModelOutput:
        return kind(last_hidden_state=current[0])

    for module in frozen:
        module.forward = forward
    try:
        yield lambda hidden: current.__setitem__(slice(None), [hidden])
    finally:
        for module, before in zip(frozen, own, strict=True):
            if before is None:
                del module.forward
            else:
                module.forward = before
