"""A span model in a folder: the adapter (or the weights), the head with the embeddings of two tokens, the tokenizer.

`korquad_head.safetensors`:

| key | shape | dtype | meaning |
|---|---|---|---|
| `weight`, `bias` | [2, hidden], [2] | float32 | hidden state → logits of start and end |
| `marker_tokens` | [2] | int64 | ids of `<|SEP|>` and `<|EOS|>` |
| `marker_embeddings` | [2, embedding] | float32 | what the embedding gives for them |
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ....adapters import require_peft
from ....checkpoint.model_class import class_for_source
from ....checkpoint.staging import recover, save_tensors, staged
from ....config import recorded_repository
from ....records import HEAD_NAME
from ..training import RECORDS
from .features import special_tokens
from .model import SpanModel

_ADAPTER = "adapter_config.json"


def save_korquad_model(model: SpanModel, tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike[str]) -> None:
    """Writes all that `load_korquad_model` needs but the base of an adapter, whole or not at all."""
    tensors = {
        "weight": model.head.weight,
        "bias": model.head.bias,
        "marker_tokens": torch.tensor(model.marker_tokens, dtype=torch.int64),
        "marker_embeddings": model.marker_embeddings,
    }
    with staged(folder, gone=RECORDS) as staging:
        if model.backbone is model.language_model:
            if any(parameter.requires_grad for parameter in model.backbone.parameters()):
                model.backbone.save_pretrained(staging)  # where it is frozen, it is a base like that of an adapter
        else:  # an adapter: those of the two tokens are in the head's file, and the rest of the embeddings in the base
            model.backbone.save_pretrained(staging, save_embedding_layers=False)
        save_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, staging / HEAD_NAME)
        tokenizer.save_pretrained(staging)
        # PEFT's empty form of a card; the card of this model is written from what is known of it.
        (staging / "README.md").unlink(missing_ok=True)


def load_korquad_model(
    folder: str | os.PathLike[str], base: Any = None, **loading: Any
) -> tuple[SpanModel, PreTrainedTokenizerBase]:
    """What `finetune_korquad` saved, in evaluation mode, and its tokenizer.

    Args:
        folder: the output of `finetune_korquad`.
        base: the model under the adapter (or under a head that was trained alone), its folder or its name on the Hub;
            None takes the one on the Hub that the adapter names. A model is changed in place.
        loading: arguments of `from_pretrained` for the base, such as `dtype`, `device_map`, `sparsity_config`.

    Raises:
        FileNotFoundError: `folder` holds no span model.
        ValueError: `base` is missing, or there is no use for it, or a tensor of the head, which is named, does not fit
            the base.
        ImportError: there is an adapter, and PEFT is not installed.
    """
    folder = Path(folder)
    recover(folder)
    if not (folder / HEAD_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no {HEAD_NAME}: it is not the output of finetune_korquad")
    is_whole = (folder / "config.json").is_file()
    if is_whole and base is not None:
        raise ValueError(f"{folder} holds a whole model and no adapter: leave base out")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    state = load_file(folder / HEAD_NAME)
    if is_whole:
        backbone: Any = class_for_source(folder, **loading).from_pretrained(folder, **{"dtype": "auto", **loading})
        _make_room(backbone, state)  # merged, it has the embeddings of its base
    else:
        backbone = _on_base(folder, base, state, loading)
    if special_tokens(tokenizer):
        raise ValueError(f"the tokenizer in {folder} lacks {special_tokens(tokenizer)[0]}")
    model = SpanModel(backbone, state["marker_tokens"].tolist())
    own = {"weight": model.head.weight, "bias": model.head.bias, "marker_embeddings": model.marker_embeddings}
    for name, parameter in own.items():
        if state[name].shape != parameter.shape:
            raise ValueError(
                f"{HEAD_NAME}: {name} is {list(state[name].shape)}, this base needs {list(parameter.shape)}: it was "
                "trained on another one"
            )
        parameter.data.copy_(state[name])
    return model.eval(), tokenizer


def _make_room(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Rows for the two tokens, whose embeddings come from the head's file."""
    rows = int(state["marker_tokens"].max()) + 1
    if rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _on_base(folder: Path, base: Any, state: dict[str, torch.Tensor], loading: dict[str, Any]) -> Any:
    """The base, with the adapter where there is one."""
    has_adapter = (folder / _ADAPTER).is_file()
    if not has_adapter and base is None:
        raise ValueError(f"{folder} holds a head alone: pass base, the model that it was trained on")
    if has_adapter:
        require_peft()
    if base is None:
        from peft import PeftConfig

        name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
        base = recorded_repository(name)
        if base is None:
            raise ValueError(f"{folder} names no base model on the Hub, but {name!r}: pass base")
    if isinstance(base, str | os.PathLike):
        base = class_for_source(base, **loading).from_pretrained(base, **{"dtype": "auto", **loading})
    _make_room(base, state)
    if not has_adapter:
        return base
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder))
