"""Custom operators of the sparse linear module. Registered as operators, so that `torch.compile` takes each as one
node, and so that training keeps packed weights: backward decompresses again instead of saving a dense weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..packing import unpack, unpack_mask


@torch.library.custom_op("ksparse::decompress", mutates_args=())
def decompress(values: torch.Tensor, bits: torch.Tensor, in_features: int) -> torch.Tensor:
    """Packed weight to dense [out, in_features]."""
    return unpack(values, bits, in_features)


@decompress.register_fake
def _(values: torch.Tensor, bits: torch.Tensor, in_features: int) -> torch.Tensor:
    return values.new_empty(bits.shape[0], in_features)


@torch.library.custom_op("ksparse::gather", mutates_args=())
def gather(dense: torch.Tensor, bits: torch.Tensor, values_shape: list[int]) -> torch.Tensor:
    """The entries of `dense` [out, in] at the mask, in the shape of the values."""
    return dense[unpack_mask(bits, dense.shape[1])].view(values_shape)


@gather.register_fake
def _(dense: torch.Tensor, bits: torch.Tensor, values_shape: list[int]) -> torch.Tensor:
    return dense.new_empty(values_shape)


@torch.library.custom_op("ksparse::linear", mutates_args=())
def linear(
    x: torch.Tensor, values: torch.Tensor, bits: torch.Tensor, bias: torch.Tensor | None, in_features: int
) -> torch.Tensor:
    """y = x·Wᵀ + b, W packed as in `packing`. x: [..., in_features], bias: [out]; y: [..., out]."""
    return F.linear(x, unpack(values, bits, in_features), bias)


@linear.register_fake
def _(
    x: torch.Tensor, values: torch.Tensor, bits: torch.Tensor, bias: torch.Tensor | None, in_features: int
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], bits.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, values, bits, _, ctx.in_features = inputs
    ctx.values_shape = list(values.shape)
    # The input is needed for the gradient of the weight only: LoRA on frozen weights does not keep it.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values if ctx.needs_input_grad[0] else None, bits)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, values, bits = ctx.saved_tensors
    grad_x = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ decompress(values, bits, ctx.in_features)
    if ctx.needs_input_grad[1]:
        dense = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, ctx.in_features)
        grad_values = gather(dense, bits, ctx.values_shape)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, grad_values, None, grad_bias, None


linear.register_autograd(_backward, setup_context=_save)
