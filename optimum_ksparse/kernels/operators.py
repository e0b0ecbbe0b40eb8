"""Custom operators of the sparse linear module. Registered as operators, so that `torch.compile` takes each as one
node, and so that training keeps packed weights: backward decompresses again instead of saving a dense weight."""

from __future__ import annotations

from typing import Any

import torch

from ..packing import unpack, unpack_mask
from .candidates import GROUPS, KERNELS, PackedWeight, Problem, aligned
from .dispatch import choose
from .products import mm

_unsafe_view = torch.ops.aten._unsafe_view.default


@torch.library.custom_op("ksparse::decompress", mutates_args=())
def decompress(values: torch.Tensor, bits: torch.Tensor, in_features: int, pattern: str = "") -> torch.Tensor:
    """Packed weight to dense [out, in_features]; with its `pattern`, by a kernel where there is one."""
    if _has_kernel(values, bits, in_features, pattern):
        from .triton.dense import decompress

        return decompress(aligned(values), aligned(bits), in_features, GROUPS[pattern])
    return unpack(values, bits, in_features)


@decompress.register_fake
def _(values: torch.Tensor, bits: torch.Tensor, in_features: int, pattern: str = "") -> torch.Tensor:
    return values.new_empty(bits.shape[0], in_features)


@torch.library.custom_op("ksparse::gather", mutates_args=())
def gather(dense: torch.Tensor, bits: torch.Tensor, values_shape: list[int], pattern: str = "") -> torch.Tensor:
    """The entries of `dense` [out, in] at the mask, in the shape of the values."""
    if _has_kernel(dense, bits, dense.shape[1], pattern):
        from .triton.dense import gather

        return gather(aligned(dense), aligned(bits), GROUPS[pattern])
    return dense[unpack_mask(bits, dense.shape[1])].view(values_shape)


@gather.register_fake
def _(dense: torch.Tensor, bits: torch.Tensor, values_shape: list[int], pattern: str = "") -> torch.Tensor:
    return dense.new_empty(values_shape)


@torch.library.custom_op("ksparse::linear", mutates_args=())
def linear(
    x: torch.Tensor,
    values: torch.Tensor,
    bits: torch.Tensor,
    bias: torch.Tensor | None,
    in_features: int,
    pattern: str = "",
    kernel_name: str = "auto",
    library: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x·Wᵀ + b, W packed as in `packing`. x: [..., in_features], bias: [out]; y: [..., out].

    Args:
        pattern: of the weight, as `str(Pattern)`; without it no kernel is taken.
        kernel_name: "auto" or one of `KERNELS`.
        library: as in `PackedWeight`.

    Raises:
        RuntimeError: x has another width or dtype, as `F.linear` does.
        ValueError: `kernel_name` cannot take this product.
    """
    return _compute(x, PackedWeight(values, bits, in_features, pattern, library), bias, kernel_name)


@linear.register_fake
def _(
    x: torch.Tensor,
    values: torch.Tensor,
    bits: torch.Tensor,
    bias: torch.Tensor | None,
    in_features: int,
    pattern: str = "",
    kernel_name: str = "auto",
    library: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], bits.shape[0])


def apply(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, kernel: str = "auto") -> torch.Tensor:
    """`linear`; without the operator, which costs some 20 microseconds, where nothing differentiates, traces or
    compiles."""
    if (
        type(x) is torch.Tensor
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not x.is_meta
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    ):
        return _compute(x, weight, bias, kernel)
    values, bits, in_features, pattern, library = weight
    return linear(x, values, bits, bias, in_features, pattern, kernel, library)


def _compute(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, kernel: str) -> torch.Tensor:
    """`linear` without autograd."""
    values, _, in_features, _, _ = weight
    if x.shape[-1] != in_features or x.dtype != values.dtype:
        raise RuntimeError(f"x is {x.dtype} {list(x.shape)}, this layer takes {values.dtype} [..., {in_features}]")
    shape = (*x.shape[:-1], weight.out_features)
    tokens = x if x.ndim == 2 else x.reshape(-1, in_features)
    if tokens.shape[0] == 0:
        return x.new_empty(shape)
    y = choose(weight, tokens.shape[0], kernel).run(tokens, weight, bias)
    # Not a view for autograd: some models add to a layer's output in place (Falcon, with parallel attention).
    return y if x.ndim == 2 else _unsafe_view(y, shape)


def _has_kernel(values: torch.Tensor, bits: torch.Tensor, in_features: int, pattern: str) -> bool:
    problem = Problem(bits.shape[0], in_features, 1, pattern, values.dtype, values.device)
    # In the interpreter kernels run where a test forces them only.
    return values.is_cuda and values.numel() > 0 and KERNELS["decompress"].why_not(problem) is None


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, values, bits, _, ctx.in_features, ctx.pattern, _, _ = inputs
    ctx.values_shape = list(values.shape)
    # The input is needed for the gradient of the weight only: LoRA on frozen weights does not keep it.
    needed = x if ctx.needs_input_grad[1] else None, values if ctx.needs_input_grad[0] else None
    ctx.save_for_backward(*needed, bits)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, values, bits = ctx.saved_tensors
    grad_x = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = decompress(values, bits, ctx.in_features, ctx.pattern)
        grad_x = mm(grad.reshape(-1, grad.shape[-1]), weight).view(*grad.shape[:-1], ctx.in_features)
    if ctx.needs_input_grad[1]:
        full = mm(grad.reshape(-1, grad.shape[-1]).T, x.reshape(-1, ctx.in_features))
        grad_values = gather(full, bits, ctx.values_shape, ctx.pattern)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, grad_values, None, grad_bias, None, None, None, None


linear.register_autograd(_backward, setup_context=_save)
