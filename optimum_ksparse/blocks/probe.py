"""One sample run through the dense model, before any work, to learn how it runs its blocks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from .calls import Call, split_call
from .find import DecoderBlocks
from .running import device_of, products, replaced_forward, run_decoder


@dataclass
class Probe:
    """How a model runs its blocks.

    Attributes:
        rests: what each block returns beside the hidden states; None: nothing but them.
        times: how often each block is called.
        in_line: whether each block is called once at most, in their order, with the very hidden states that the one
            before returned and no second stream of them (reversible layers), so that each can be run on the outputs of
            the one before.
    """

    rests: list[tuple[Any, ...] | None]
    times: list[int]
    in_line: bool = True


def probe(
    decoder_blocks: DecoderBlocks,
    tokens: torch.Tensor,
    resident: Callable[[int], AbstractContextManager[None]],
    dtype: torch.dtype | None,
) -> Probe:
    """Runs `tokens` [samples, seq_len] through the model, products in the blocks in `dtype` (None: the weights').

    Raises:
        TypeError: a block returns no hidden states; names it.
        ValueError: the model overflows; names the block. Or running it changes its weights.
    """
    blocks = decoder_blocks.blocks
    probed = Probe([None] * len(blocks), [0] * len(blocks))
    last: list[tuple[int, Any]] = []  # the block that was called last, and what it returned

    def checked(index: int) -> Callable[..., Any]:
        block, original = blocks[index], blocks[index].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = split_call(args, kwargs)
            for before, output in last:
                returned = hidden_of(output)
                probed.in_line &= index > before and (hidden is returned or torch.equal(hidden, returned))
                probed.in_line &= not _hands_on(output, call)
            with resident(index), products(block, device_of(block), dtype):
                output = original(*args, **kwargs)
                _check_output(decoder_blocks, index, hidden_of(output), dtype)
            probed.times[index] += 1
            probed.rests[index] = tuple(output[1:]) if type(output) in (tuple, list) else None
            # What the model reads by name is its own to make.
            probed.in_line &= type(output) in (tuple, list) or isinstance(output, torch.Tensor)
            last[:] = [(index, output)]
            return output

        return forward

    weights = {name: (weight, weight._version) for name, weight in decoder_blocks.decoder.named_parameters()}
    with replaced_forward(blocks, checked):
        run_decoder(decoder_blocks.decoder, tokens)
    written = [name for name, (weight, version) in weights.items() if weight._version != version]
    # RWKV, which divides weights once, and then the hidden states by as much. Its flag tells of a run before this one.
    if not probed.in_line and (written or getattr(decoder_blocks.decoder, "layers_are_rescaled", False)):
        raise ValueError(
            f"{type(decoder_blocks.decoder).__name__} changes its own weights when it runs, so what is saved would "
            "not be the model that was pruned: load it anew with rescale_every=0, or another setting without that"
        )
    return probed


def hidden_of(output: Any) -> Any:
    """The hidden states in what a block returned."""
    return output[0] if isinstance(output, tuple | list | ModelOutput) else output


def _hands_on(output: Any, call: Call) -> bool:
    """Whether a block is called with a tensor like hidden states that the one before returned beside them."""
    if isinstance(output, torch.Tensor):
        return False
    hidden, *rest = output.to_tuple() if isinstance(output, ModelOutput) else output
    others = [*call.args, *call.kwargs.values()]
    return any(
        isinstance(value, torch.Tensor) and value.shape == hidden.shape and any(value is other for other in others)
        for value in rest
    )


def _check_output(decoder_blocks: DecoderBlocks, index: int, hidden: Any, dtype: torch.dtype | None) -> None:
    name, block = decoder_blocks.name_in_decoder(index), decoder_blocks.blocks[index]
    if not isinstance(hidden, torch.Tensor):
        raise TypeError(f"block {name} ({type(block).__name__}) returns {type(hidden).__name__}, not a tensor")
    if bool(hidden.isfinite().all()):
        return
    _check_weights(name, block)
    if dtype is torch.float16:
        raise ValueError(
            f"block {name} gives NaN or Inf with calibration_dtype='float16': take 'bfloat16', or leave it out"
        )
    raise ValueError(
        f"block {name} gives NaN or Inf in {hidden.dtype} on the calibration data: the model cannot "
        "be calibrated as it is; look at its weights, or load it in float32 or bfloat16"
    )


def _check_weights(name: str, block: nn.Module) -> None:
    for path, parameter in block.named_parameters():
        if parameter.device.type != "meta" and not bool(parameter.isfinite().all()):
            raise ValueError(f"{name}.{path} holds NaN or Inf; prune a checkpoint whose weights are whole")
