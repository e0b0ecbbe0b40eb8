"""The loss of a causal LM over the positions that have a label alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import ModelOutput

from ...evaluation.head import frozen_base

# Logits held at a time: a vocabulary of 262,144 words and 4 × 512 positions would take 2 GB in float32, and their
# softmax and its gradient as much again.
_LOGITS_BYTES = 128 * 2**20


@contextmanager
def answer_loss(model: PreTrainedModel) -> Iterator[None]:
    """Within it the forward pass of a causal LM that is given `labels` [batch, positions] (−100 where there is none)
    returns the `loss` alone, that of the model itself, summed and divided by `num_items_in_batch` or else by the
    number of labels. Logits are computed for the positions that predict a label, a part at a time where a vocabulary
    is large; those are computed once more in the backward pass, instead of being kept."""
    own = vars(model).get("forward")
    original = model.forward
    head = functools.partial(_part_loss, model, original)

    def forward(*args: Any, labels: torch.Tensor | None = None, **inputs: Any) -> ModelOutput:
        if labels is None:
            return original(*args, **inputs)
        count = inputs.pop("num_items_in_batch", None)
        output = model.base_model(*args, **inputs, use_cache=False)
        kept = labels[:, 1:] != -100  # position p predicts token p + 1
        hidden, targets = output[0][:, :-1], labels[:, 1:][kept]
        hidden = hidden[kept.to(hidden.device)]
        size = max(1, _LOGITS_BYTES // (4 * model.config.get_text_config(decoder=True).vocab_size))
        parts = [(type(output), h, t) for h, t in zip(hidden.split(size), targets.split(size), strict=True)]
        if len(parts) == 1:
            total = head(*parts[0])
        else:
            losses = [checkpoint(head, *part, use_reentrant=False) for part in parts]
            total = torch.stack(losses).sum()
        return CausalLMOutput(loss=total / (max(1, len(targets)) if count is None else count))

    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _part_loss(
    model: PreTrainedModel, original: Any, kind: type[ModelOutput], hidden: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Summed loss in float32 over hidden states [positions, width], by the model's own head."""
    with frozen_base(model, kind) as set_hidden:
        set_hidden(hidden[None])
        logits = original(input_ids=targets[None]).logits[0]
    return F.cross_entropy(logits.float(), targets.to(logits.device), reduction="sum")
