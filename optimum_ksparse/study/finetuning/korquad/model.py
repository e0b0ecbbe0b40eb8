"""A head that finds spans, over the decoder of any causal language model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from ....blocks import decoder_of
from .features import END, SEPARATOR, special_tokens


@dataclass
class SpanOutput(ModelOutput):
    """Attributes:
    loss: mean of the cross entropies of start and end; None without labels.
    start_logits, end_logits: float32 [windows, tokens], −inf where no span may begin or end.
    """

    loss: torch.Tensor | None = None
    start_logits: torch.Tensor | None = None
    end_logits: torch.Tensor | None = None


class SpanModel(nn.Module):
    """The decoder of a causal language model, its last norm included, and a linear head that says of each token how
    likely it begins, and ends, the answer. The language model's own head does not run.

    A token of a causal model has seen what is left of it alone: the question comes first, so that all of the paragraph
    has seen it. Transformers' classes for question answering are not used: some models have none, and that of others
    does not find its decoder's weights.

    Args:
        backbone: a causal LM, sparse or dense, or a PEFT model of one. Which of its parameters train is its own
            affair.
        marker_tokens: ids of `<|SEP|>` and `<|EOS|>`, which most backbones do not know: their embeddings are
            parameters of this model, and train, while those of the backbone stay. It works for tied embeddings, and
            costs no gradient of the whole matrix.

    Attributes:
        head: hidden state → logits of start and end, in float32.
        marker_embeddings: [2, embedding], in float32, what the backbone's embedding gives for them.
    """

    def __init__(self, backbone: Any, marker_tokens: list[int]) -> None:
        super().__init__()
        self.backbone = backbone
        model = self.language_model
        decoder = decoder_of(model)
        embedding: Any = model.get_input_embeddings()
        device = embedding.weight.device
        width = model.config.get_text_config(decoder=True).hidden_size
        self.head = nn.Linear(width, 2, device=device, dtype=torch.float32)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)  # all tokens start even, however large the hidden states of the model are
        self.marker_tokens = list(marker_tokens)
        with torch.no_grad():
            rows = embedding(torch.tensor(self.marker_tokens, dtype=torch.int64, device=device))
        self.marker_embeddings = nn.Parameter(rows.detach().float().clone())
        embedding.register_forward_hook(self._embed_markers)
        self._without_cache = bool(inspect.signature(decoder.forward).parameters.keys() & {"use_cache", "kwargs"})

    @property
    def language_model(self) -> PreTrainedModel:
        """The causal LM, without the wrapper of PEFT."""
        unwrap = getattr(self.backbone, "get_base_model", None)
        return self.backbone if unwrap is None else unwrap()

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        span_mask: torch.Tensor,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
    ) -> SpanOutput:
        """Tensors as `features.collate` makes them."""
        decoder = decoder_of(self.language_model)
        cache = {"use_cache": False} if self._without_cache else {}
        hidden = decoder(input_ids=input_ids, attention_mask=attention_mask, **cache)[0]
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.head(hidden.to(self.head.weight.device, torch.float32))
        span_mask = span_mask.to(logits.device)
        start, end = (part.masked_fill(~span_mask, -torch.inf) for part in logits.unbind(-1))
        if start_positions is None or end_positions is None:
            return SpanOutput(None, start, end)
        losses = [
            F.cross_entropy(part, wanted.to(part.device))
            for part, wanted in ((start, start_positions), (end, end_positions))
        ]
        return SpanOutput((losses[0] + losses[1]) / 2, start, end)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Names and parameters that train."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Of what trains alone: a checkpoint of a run does not hold the backbone."""
        return {name: parameter.detach() for name, parameter in self.trained_parameters().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what `state_dict` returned. Raises RuntimeError where it is of another model."""
        own = self.trained_parameters()
        if state_dict.keys() != own.keys():
            name = sorted(state_dict.keys() ^ own.keys())[0]
            raise RuntimeError(f"the state is of another model: {name} is {'missing' if name in own else 'unknown'}")
        super().load_state_dict(state_dict, strict=False, assign=assign)
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """As of transformers' models, for `Trainer`."""
        self.language_model.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """The same by its former name, which earlier versions of transformers call."""
        self.language_model.gradient_checkpointing_enable(**kwargs)

    def _embed_markers(self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        ids = inputs[0]
        for row, token in enumerate(self.marker_tokens):
            rows = self.marker_embeddings[row].to(output.device, output.dtype)
            output = torch.where((ids == token).unsqueeze(-1), rows, output)
        return output


def prepare_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Adds `<|SEP|>` and `<|EOS|>` to a tokenizer that lacks them, and makes room for them in the embeddings, in
    place; new rows are the mean of the others.

    Returns:
        Ids of the two.

    Raises:
        TypeError: the tokenizer is a slow one.
    """
    new = special_tokens(tokenizer)
    tokenizer.add_tokens(new, special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in (SEPARATOR, END)]
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    fresh = [i for i in ids if i >= rows or i in (vocabulary[token] for token in new)]
    if not fresh:
        return ids
    mean = embeddings.weight.detach()[: min(fresh)].float().mean(0)
    if max(ids) >= rows:
        trains = embeddings.weight.requires_grad
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        embeddings = model.get_input_embeddings()
        embeddings.weight.requires_grad_(trains)
    with torch.no_grad():
        embeddings.weight[fresh] = mean.to(embeddings.weight.dtype)
    return ids
