"""Linear maps whose weight a model reads by itself, instead of calling them: a sparse module cannot take their places.

Mamba, for one, computes `self.dt_proj.weight @ x`. The source tells where that may be, a short run what happens.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import nn

from ..nn import is_linear_map
from .blocks import DecoderBlocks
from .replay import always_there
from .running import evaluation_mode, replaced_forward, run_decoder

_TOKENS = 8


@torch.no_grad()
def find_read(
    decoder_blocks: DecoderBlocks, resident: Callable[[int], AbstractContextManager[None]] = always_there
) -> set[str]:
    """Paths in the decoder of the linear maps that a block does not call although it calls the module that holds them.
    Where no source reads a weight, as in most models, nothing is run.

    Args:
        decoder_blocks: of the dense model.
        resident: within `resident(index)` the weights of a block are there.
    """
    blocks = decoder_blocks.blocks
    if not any(_may_read(block) for block in blocks):
        return set()
    called: list[set[str]] = [set() for _ in blocks]

    def watched(index: int) -> Callable[..., object]:
        block, original = blocks[index], blocks[index].forward

        def forward(*args: object, **kwargs: object) -> object:
            with resident(index), ExitStack() as hooks:
                for name, module in block.named_modules():
                    note = lambda *_, name=name: called[index].add(name)  # noqa: E731
                    hooks.callback(module.register_forward_pre_hook(note).remove)
                return original(*args, **kwargs)

        return forward

    vocabulary = len(decoder_blocks.model.get_input_embeddings().weight)  # type: ignore[arg-type]
    with evaluation_mode(decoder_blocks.model), replaced_forward(blocks, watched):
        run_decoder(decoder_blocks.decoder, torch.arange(1, _TOKENS + 1).remainder(vocabulary).unsqueeze(0))
    return {
        decoder_blocks.name_in_decoder(index, name)
        for index, block in enumerate(blocks)
        for name, module in block.named_modules()
        if is_linear_map(module) and name not in called[index] and name.rpartition(".")[0] in {"", *called[index]}
    }


def _may_read(block: nn.Module) -> bool:
    """Whether the source of a module in a block has the weight of a linear map in it."""
    names = {name.rpartition(".")[2] for name, module in block.named_modules() if is_linear_map(module)}
    return any(names & _weights_in_source(kind) for kind in {type(module) for module in block.modules()})


def _weights_in_source(kind: type[nn.Module]) -> set[str]:
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return set()
    return set(re.findall(r"\b(\w+)\.weight\b", source))
