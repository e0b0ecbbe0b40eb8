"""Custom operators of the sparse linear module. Registered as operators, so that `torch.compile` takes each as one
node, and so that training keeps packed weights: backward reads them again instead of saving a dense weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from ..packing import unpack_mask
from .candidates import GROUPS, KERNELS, PackedWeight, Problem, aligned
from .cpu import NativeWeight, multiplies_in
from .dispatch import choose
from .products import mm

_unsafe_view = torch.ops.aten._unsafe_view.default


@torch.library.custom_op("ksparse::decompress", mutates_args=())
def decompress(
    values: torch.Tensor,
    bits: torch.Tensor,
    in_features: int,
    pattern: str = "",
    scale: torch.Tensor | None = None,
    group_size: int = 0,
) -> torch.Tensor:
    """Packed weight to dense [out, in_features]; with its `pattern`, by a kernel where there is one. Quantised values
    have a `scale` (table in `quantization`)."""
    if scale is None and _has_kernel(values, bits, in_features, pattern):
        from .triton.dense import decompress

        return decompress(aligned(values), aligned(bits), in_features, GROUPS[pattern])
    weight = PackedWeight(values, bits, in_features, pattern, None, scale, group_size)
    if _is_native(values, scale):
        weight = weight.contiguous()
        return weight.native().dense()
    return weight.dense()


@decompress.register_fake
def _(
    values: torch.Tensor,
    bits: torch.Tensor,
    in_features: int,
    pattern: str = "",
    scale: torch.Tensor | None = None,
    group_size: int = 0,
) -> torch.Tensor:
    return (values if scale is None else scale).new_empty(bits.shape[0], in_features)


@torch.library.custom_op("ksparse::grad_input", mutates_args=())
def grad_input(
    grad: torch.Tensor,
    values: torch.Tensor,
    bits: torch.Tensor,
    in_features: int,
    pattern: str,
    scale: torch.Tensor | None = None,
    group_size: int = 0,
) -> torch.Tensor:
    """grad·W: grad [..., out] to [..., in_features]."""
    if gains_natively(values, grad.dtype, scale):
        weight = PackedWeight(values, bits, in_features, pattern, None, scale, group_size).contiguous()
        return weight.native().grad_input(grad)
    dense = decompress(values, bits, in_features, pattern, scale, group_size)
    return mm(grad.reshape(-1, grad.shape[-1]), dense).view(*grad.shape[:-1], in_features)


@grad_input.register_fake
def _(grad: torch.Tensor, values: torch.Tensor, bits: torch.Tensor, in_features: int, *_: Any) -> torch.Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


@torch.library.custom_op("ksparse::grad_values", mutates_args=())
def grad_values(
    grad: torch.Tensor, x: torch.Tensor, values: torch.Tensor, bits: torch.Tensor, pattern: str
) -> torch.Tensor:
    """gradᵀ·x at the mask, in the shape of the values; grad [..., out], x [..., in]."""
    in_features = x.shape[-1]
    if _is_native(values) and grad.dtype == values.dtype:
        weight = PackedWeight(values, bits, in_features, pattern).contiguous()
        return weight.native().grad_values(grad, x).view(values.shape)
    full = mm(grad.reshape(-1, grad.shape[-1]).T, x.reshape(-1, in_features))
    if _has_kernel(full, bits, in_features, pattern):
        from .triton.dense import gather

        return gather(aligned(full), aligned(bits), GROUPS[pattern])
    return full[unpack_mask(bits, in_features)].view(values.shape)


@grad_values.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, values: torch.Tensor, bits: torch.Tensor, pattern: str) -> torch.Tensor:
    return torch.empty_like(values)


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
    scale: torch.Tensor | None = None,
    group_size: int = 0,
) -> torch.Tensor:
    """y = x·Wᵀ + b, W packed as in `packing`. x: [..., in_features], bias: [out]; y: [..., out].

    Args:
        pattern: of the weight, as `str(Pattern)`; without it no kernel is taken.
        kernel_name: "auto" or one of `KERNELS`.
        library, scale, group_size: as in `PackedWeight`.

    Raises:
        RuntimeError: x has another width or dtype, as `F.linear` does.
        ValueError: `kernel_name` cannot take this product.
    """
    weight = PackedWeight(values, bits, in_features, pattern, library, scale, group_size)
    return _compute(x, weight, bias, kernel_name)


@linear.register_fake
def _(x: torch.Tensor, values: torch.Tensor, bits: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], bits.shape[0])


def runs_plainly(x: torch.Tensor) -> bool:
    """Whether nothing differentiates, traces or compiles: then the operator, which costs some 20 microseconds, is
    not needed."""
    return (
        type(x) is torch.Tensor
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not x.is_meta
        and not x.is_neg()  # views whose numbers are not what lies in memory
        and not x._is_zerotensor()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and not is_transformed()
    )


def is_transformed() -> bool:
    """Whether a function transform (`torch.vmap`, `torch.func.grad`, `jvp`) or forward-mode differentiation is at
    work. Operators registered as these are have no part in it: some fail, some give no derivative without a word."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def apply(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, kernel: str = "auto") -> torch.Tensor:
    """`linear`, without the operator where there is no need of it."""
    if runs_plainly(x):
        return _compute(x, weight, bias, kernel)
    values, bits, in_features, pattern, library, scale, group_size = weight
    if not torch.compiler.is_compiling() and is_transformed():
        return F.linear(x, differentiable(weight), bias)
    return linear(x, values, bits, bias, in_features, pattern, kernel, library, scale, group_size)


def differentiable(weight: PackedWeight) -> torch.Tensor:
    """The dense weight [out, in], by operators of torch, through which gradients reach the values."""
    values, bits, in_features = weight[:3]
    if weight.scale is not None:
        return weight.dense()
    return values.new_zeros(len(bits), in_features).masked_scatter(unpack_mask(bits, in_features), values)


def native_weight(weight: PackedWeight, kernel: str) -> NativeWeight | None:
    """The weight for native code on the CPU, to be kept for one call after the other; None where something else
    computes it."""
    tensors = [tensor for tensor in (weight.values, weight.bits, weight.scale) if tensor is not None]
    usable = weight.values.is_cpu and weight.values.numel() and all(tensor.is_contiguous() for tensor in tensors)
    return weight.native() if usable and choose(weight, 1, kernel).kernel == "native" else None


def _compute(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, kernel: str) -> torch.Tensor:
    """`linear` without autograd."""
    in_features = weight.in_features
    if x.shape[-1] != in_features or x.dtype != weight.dtype:
        raise RuntimeError(f"x is {x.dtype} {list(x.shape)}, this layer takes {weight.dtype} [..., {in_features}]")
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


def _is_native(values: torch.Tensor, scale: torch.Tensor | None = None) -> bool:
    problem = Problem(1, 1, 1, "", values.dtype if scale is None else scale.dtype, values.device)
    return values.numel() > 0 and KERNELS["native"].why_not(problem) is None


def gains_natively(values: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None) -> bool:
    """Whether products with many tokens of `dtype` take less time from the packed weight, by native code, than from
    the dense one."""
    own = values.dtype if scale is None else scale.dtype
    return dtype == own and _is_native(values, scale) and not multiplies_in(dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, values, bits, _, ctx.in_features, ctx.pattern, _, _, scale, ctx.group_size = inputs
    # The input is needed for the gradient of the weight only: LoRA on frozen weights does not keep it.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, bits, scale)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, values, bits, scale = ctx.saved_tensors
    grad_x = grad_kept = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad_input(grad, values, bits, ctx.in_features, ctx.pattern, scale, ctx.group_size)
    if ctx.needs_input_grad[1]:
        grad_kept = grad_values(grad, x, values, bits, ctx.pattern)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, grad_kept, None, grad_bias, None, None, None, None, None, None


linear.register_autograd(_backward, setup_context=_save)
