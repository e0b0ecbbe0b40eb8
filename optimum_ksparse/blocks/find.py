"""Finding the decoder blocks of a model from the model itself, with no table of architectures."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ..nn import is_linear_map
from .experts import find_stacks
from .running import evaluation_mode, run_decoder

_FEW_TOKENS = 8


@dataclass
class DecoderBlocks:
    """Where a model keeps its decoder blocks.

    Attributes:
        model: the whole model.
        decoder: the module that runs the blocks; takes `input_ids`.
        decoder_name: its path in the model, "" where it is the model.
        paths: of each block in the decoder, such as "layers.0".
        blocks: the blocks, in order; those of one list are next to each other.
    """

    model: PreTrainedModel
    decoder: nn.Module
    decoder_name: str
    paths: list[str]
    blocks: list[nn.Module]

    @property
    def list_names(self) -> list[str]:
        """Paths in the decoder of the lists of blocks: one, but for models of several stacks."""
        return list(dict.fromkeys(path.rpartition(".")[0] for path in self.paths))

    def name_in_decoder(self, index: int, name: str = "") -> str:
        """Path in the decoder of the module `name` of block `index`, or of the block itself."""
        return f"{self.paths[index]}.{name}".rstrip(".")

    def name_in_model(self, index: int, name: str = "") -> str:
        """Path in the model of the module `name` of block `index`, or of the block itself."""
        return f"{self.decoder_name}.{self.name_in_decoder(index, name)}".lstrip(".")

    def of(self, model: PreTrainedModel) -> DecoderBlocks:
        """The blocks of another model of the same class and config."""
        decoder = model.get_submodule(self.decoder_name)
        blocks = [decoder.get_submodule(path) for path in self.paths]
        return DecoderBlocks(model, decoder, self.decoder_name, list(self.paths), blocks)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What the paths of everything in the blocks begin with, from the model's root, such as "model.layers."."""
        return tuple(f"{self.decoder_name}.{name}.".lstrip(".") for name in self.list_names)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that runs the decoder blocks: `get_decoder()`, or the base model where that one holds no list of
    blocks."""
    decoder = model.get_decoder()
    return decoder if any(isinstance(m, nn.ModuleList) for m in decoder.modules()) else model.base_model


def find_blocks(model: PreTrainedModel) -> DecoderBlocks:
    """Finds the decoder blocks: the modules in each `ModuleList` under `get_decoder()`, never in one inside another,
    that hold linear maps. Where there are several such lists, those whose modules are called with text: a decoder may
    have more than one stack, and an encoder of images beside it may be larger.

    Raises:
        ValueError: the model is an encoder-decoder or an encoder, has no such list, or has several and cannot be run
            with text alone to tell them apart; says what was found.
    """
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, found {kind}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder; only decoder-only language models can be pruned")
    decoder = decoder_of(model)
    lists = _lists_of_modules(decoder)
    if not lists:
        children = ", ".join(f"{name} ({type(child).__name__})" for name, child in decoder.named_children())
        raise ValueError(
            f"{kind} has no decoder blocks: no ModuleList in {type(decoder).__name__}, which holds "
            f"{children or 'nothing'}; only decoder-only language models can be pruned"
        )
    names = [name for name, modules in lists.items() if _are_blocks(modules)]
    if not names:
        names = [max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))]
    if len(names) > 1:
        names = _that_text_runs_through(model, decoder, {name: lists[name] for name in names})
    paths = {f"{name}.{index}": block for name in names for index, block in enumerate(lists[name])}
    # Attention modules of transformers say whether they look ahead; older ones do not, but their models cannot
    # generate.
    bidirectional = [
        f"{path}.{name}"
        for path, block in paths.items()
        for name, module in block.named_modules()
        if getattr(module, "is_causal", None) is False
    ]
    if bidirectional:
        raise ValueError(
            f"{kind} is not a decoder: its attention {bidirectional[0]} is bidirectional; "
            "only decoder-only language models can be pruned"
        )
    if model.get_output_embeddings() is not None and not model.can_generate():
        raise ValueError(
            f"{kind} is not a decoder: it cannot generate; only decoder-only language models can be pruned"
        )
    decoder_name = next(name for name, module in model.named_modules() if module is decoder)
    return DecoderBlocks(model, decoder, decoder_name, list(paths), list(paths.values()))


def _lists_of_modules(decoder: nn.Module) -> dict[str, nn.ModuleList]:
    """The `ModuleList`s that lie in no other one, by path."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in decoder.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not nested:
            lists[name] = module
    return lists


def _are_blocks(modules: nn.ModuleList) -> bool:
    """Whether the modules of a list hold linear maps or stacks of matrices, and are none themselves."""
    inside = (inner for module in modules for inner in module.modules() if inner is not module)
    return any(is_linear_map(inner) or find_stacks(inner) for inner in inside)


@torch.no_grad()
def _that_text_runs_through(model: PreTrainedModel, decoder: nn.Module, lists: dict[str, nn.ModuleList]) -> list[str]:
    """Names of the lists of which a module is called when the decoder is given a few tokens, in the order of the
    calls. All weights may be on the meta device."""
    called: dict[str, None] = {}
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.setdefault(name))
        for name, modules in lists.items()
        for module in modules
    ]
    vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    tokens = torch.arange(1, _FEW_TOKENS + 1).remainder(vocabulary).unsqueeze(0)
    is_meta = all(parameter.is_meta for parameter in decoder.parameters())
    try:
        with evaluation_mode(model), _ones_for_unknown() if is_meta else nullcontext():
            run_decoder(decoder, tokens.to("meta") if is_meta else tokens)
    except Exception as error:  # of the model's own code
        raise ValueError(
            f"{type(model).__name__} has several lists of blocks ({', '.join(lists)}), and which of them are the "
            "decoder's cannot be told, because a few tokens of text alone do not run through it: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return list(called)


class _ones_for_unknown(TorchDispatchMode):  # noqa: N801 (used like a function)
    """Within it a number that is read out of a tensor on the meta device, which has none, is 1 or True: what models
    ask of their inputs (whether nothing is masked, whether lengths fit) is so for a few tokens."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))
