"""A head that finds spans, over the decoder of any causal language model, and its file.

`korquad_head.safetensors`:

| key | shape | dtype | meaning |
|---|---|---|---|
| `head.weight`, `head.bias` | [2, hidden], [2] | float32 | hidden state → logits of start and end |
| `markers` | [2, embedding] | float32 | embeddings of separator and end |
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from ....blocks import decoder_of
from ....blocks.running import without_cache
from ....checkpoint import without_peft
from ....checkpoint.model_class import load_model
from ....checkpoint.staging import recover, save_tensors
from ....records import HEAD_NAME

_HEAD = ("head.weight", "head.bias", "markers")


class SpanModel(nn.Module):
    """The decoder of a causal language model (`backbone`, perhaps with an adapter), its last norm included, and a
    linear head that says of each token how likely it begins, and ends, the answer. The model's own head does not run.

    A token of a causal model has seen what is left of it alone: the question comes first, so that all of the paragraph
    has seen it. Transformers' classes for question answering are not used: some models have none, and that of others
    does not find its decoder's weights.

    Attributes:
        head: hidden state → logits of start and end, in float32; zero at first, so that all tokens start even.
        markers: [2, embedding], in float32: what stands in for the embeddings of the tokens −1 and −2, which the
            backbone does not have; the mean of its embeddings at first.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        model = self.language_model
        embedding: Any = model.get_input_embeddings()
        device = embedding.weight.device
        width = model.config.get_text_config(decoder=True).hidden_size
        self.head = nn.Linear(width, 2, device=device, dtype=torch.float32)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        with torch.no_grad():  # by the module, which may scale what it gives
            parts = torch.arange(embedding.weight.shape[0], device=device).split(8192)
            mean = sum(embedding(part).float().sum(0) for part in parts) / embedding.weight.shape[0]
        self.markers = nn.Parameter(mean.repeat(2, 1))

    @property
    def language_model(self) -> PreTrainedModel:
        """The causal LM, without the wrapper of PEFT."""
        model: PreTrainedModel = without_peft(self.backbone)
        return model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        span_mask: torch.Tensor,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
    ) -> ModelOutput:
        """Tensors as `windows.collate` makes them. Returns `loss`, the mean of the cross entropies of start and end,
        where there are labels; `start_logits`, `end_logits`, float32 [windows, tokens], −inf where no span may begin
        or end."""
        model = self.language_model
        embeddings = model.get_input_embeddings()(input_ids.clamp(min=0))
        markers = self.markers.to(embeddings.device, embeddings.dtype)
        for row, token in enumerate((-1, -2)):
            embeddings = torch.where((input_ids == token).unsqueeze(-1), markers[row], embeddings)
        decoder = decoder_of(model)
        hidden = decoder(inputs_embeds=embeddings, attention_mask=attention_mask, **without_cache(decoder))[0]
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.head(hidden.to(self.head.weight.device, torch.float32))
        start, end = (part.masked_fill(~span_mask.to(part.device), -torch.inf) for part in logits.unbind(-1))
        output = ModelOutput(start_logits=start, end_logits=end)
        if start_positions is None or end_positions is None:
            return output
        pairs = ((start, start_positions), (end, end_positions))
        losses = [F.cross_entropy(part, label.to(part.device)) for part, label in pairs]
        return ModelOutput(loss=(losses[0] + losses[1]) / 2, **output)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The parameters that train: a checkpoint of a run does not hold the backbone."""
        return {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """What `Trainer` calls of transformers' models."""
        self.language_model.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """The former name of `activation_checkpointing_enable`, which earlier versions of transformers call."""
        self.language_model.gradient_checkpointing_enable(**kwargs)

    def save(self, folder: Path) -> None:
        """Writes the adapter, or the weights where there is none, and the head."""
        self.backbone.save_pretrained(folder)
        tensors = {name: self.get_parameter(name).detach().cpu().contiguous() for name in _HEAD}
        save_tensors(tensors, folder / HEAD_NAME)


def load_korquad_model(
    folder: str | os.PathLike[str], base: PreTrainedModel | None = None
) -> tuple[SpanModel, PreTrainedTokenizerBase]:
    """What `finetune` saved of KorQuAD, in evaluation mode, and its tokenizer. `base` is the model under the adapter,
    which is changed in place; None where the folder holds a whole model. Raises FileNotFoundError where the folder
    holds no span model; ValueError where `base` is missing, or there is no use for it, or a tensor of the head does
    not fit it."""
    folder = Path(folder)
    recover(folder)
    if not (folder / HEAD_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no {HEAD_NAME}: it is not the output of finetune korquad")
    is_whole = (folder / "config.json").is_file()
    if is_whole != (base is None):
        what = "holds a whole model: leave base out" if is_whole else "holds no whole model: pass base, what was tuned"
        raise ValueError(f"{folder} {what}")
    backbone: Any = base
    if is_whole:
        backbone = load_model(folder)
    else:
        from peft import PeftModel

        backbone = PeftModel.from_pretrained(backbone, str(folder))
    model, tensors = SpanModel(backbone), load_file(folder / HEAD_NAME)
    for name in _HEAD:
        parameter = model.get_parameter(name)
        shape = list(tensors[name].shape) if name in tensors else None
        if shape != list(parameter.shape):
            raise ValueError(f"{HEAD_NAME}: {name} is {shape}, this base needs {list(parameter.shape)}")
        parameter.data.copy_(tensors[name])
    return model.eval(), AutoTokenizer.from_pretrained(folder)
