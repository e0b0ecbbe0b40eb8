"""Calling a model's decoder, with other functions in the places of its blocks' forwards where that is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..kernels import fast_products


def run_decoder(decoder: nn.Module, tokens: torch.Tensor) -> None:
    """Calls a decoder with token ids [batch, seq_len], without a cache."""
    with fast_products(decoder):
        decoder(input_ids=tokens if tokens.is_meta else tokens.to(device_of(decoder)), **without_cache(decoder))


def without_cache(decoder: nn.Module) -> dict[str, Any]:
    """The argument of a decoder by which it keeps no keys and values; none where it takes no such one."""
    parameters = inspect.signature(decoder.forward).parameters
    return {"use_cache": False} if parameters.keys() & {"use_cache", "kwargs"} else {}


def device_of(module: nn.Module) -> torch.device:
    """Where a module runs, as far as its weights tell."""
    return next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))


@contextmanager
def products(block: nn.Module, device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Within it, matrix products of passes through a block on a device are in `dtype`, by autocast; None: in that of
    the weights. Where a CPU is slow in it, they are widened (`kernels.products`)."""
    with fast_products(block, dtype), nullcontext() if dtype is None else torch.autocast(device.type, dtype):
        yield


@contextmanager
def replaced_forward(blocks: Sequence[nn.Module], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Gives each block the forward `make(index)`; hooks of accelerate, which live in the same place, come back
    after."""
    before = [vars(block).get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = make(index)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is not None:
                block.forward = forward
            elif "forward" in vars(block):
                del block.forward


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
