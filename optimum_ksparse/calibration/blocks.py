"""Finding the decoder blocks of a model from the model itself, with no table of architectures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass
class DecoderBlocks:
    """Where a model keeps its decoder blocks.

    Attributes:
        model: the whole model.
        decoder: the module that runs the blocks; takes `input_ids`.
        decoder_name: its path in the model, "" where it is the model.
        list_name: path of the list of blocks in the decoder.
        blocks: the blocks, in order.
    """

    model: PreTrainedModel
    decoder: nn.Module
    decoder_name: str
    list_name: str
    blocks: list[nn.Module]

    def name_in_decoder(self, index: int, name: str) -> str:
        """Path in the decoder of the module `name` of block `index`."""
        return f"{self.list_name}.{index}.{name}"

    def name_in_model(self, index: int, name: str) -> str:
        """The same from the model's root, as in `model.named_modules()`."""
        inner = self.name_in_decoder(index, name)
        return f"{self.decoder_name}.{inner}" if self.decoder_name else inner


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that runs the decoder blocks: `get_decoder()`, or the base model where that one holds no list of
    blocks."""
    decoder = model.get_decoder()
    return decoder if any(isinstance(m, nn.ModuleList) for m in decoder.modules()) else model.base_model


def find_blocks(model: PreTrainedModel) -> DecoderBlocks:
    """Finds the decoder blocks: the `ModuleList` with the most parameters under `get_decoder()`, never one inside
    another.

    Raises:
        ValueError: the model is an encoder-decoder or an encoder, or has no such list; says what was found.
    """
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, found {kind}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder; only decoder-only language models can be pruned")
    decoder = decoder_of(model)
    lists: dict[str, nn.ModuleList] = {}
    for name, module in decoder.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not nested:
            lists[name] = module
    if not lists:
        children = ", ".join(f"{name} ({type(child).__name__})" for name, child in decoder.named_children())
        raise ValueError(
            f"{kind} has no decoder blocks: no ModuleList in {type(decoder).__name__}, which holds "
            f"{children or 'nothing'}; only decoder-only language models can be pruned"
        )
    list_name = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    blocks = list(lists[list_name])
    # Attention modules of transformers say whether they look ahead; older ones do not, but their models cannot
    # generate.
    bidirectional = [name for name, m in lists[list_name].named_modules() if getattr(m, "is_causal", None) is False]
    if bidirectional:
        raise ValueError(
            f"{kind} is not a decoder: its attention {list_name}.{bidirectional[0]} is bidirectional; "
            "only decoder-only language models can be pruned"
        )
    if model.get_output_embeddings() is not None and not model.can_generate():
        raise ValueError(
            f"{kind} is not a decoder: it cannot generate; only decoder-only language models can be pruned"
        )
    decoder_name = next(name for name, module in model.named_modules() if module is decoder)
    return DecoderBlocks(model, decoder, decoder_name, list_name, blocks)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within it the whole model is in evaluation mode. After it each module has its own mode again, or the mode of the
    one whose place it took."""
    training = [name for name, module in model.named_modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for name in training:
            model.get_submodule(name).training = True
