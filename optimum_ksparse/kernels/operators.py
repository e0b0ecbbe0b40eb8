"""Custom operators of the sparse linear module. Registered as operators, so that `torch.compile` takes each as one
node, and so that training keeps packed weights: backward decompresses again instead of saving a dense weight."""

from __future__ import annotations

from typing import Any

import torch

from ..packing import unpack, unpack_mask
from .candidates import GROUPS, KERNELS, Candidate, PackedWeight, Problem
from .dispatch import choose


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
    dense: torch.Tensor | None = None,
    library: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x·Wᵀ + b, W packed as in `packing`. x: [..., in_features], bias: [out]; y: [..., out].

    Args:
        pattern: of the weight, as `str(Pattern)`; without it no kernel is taken.
        kernel_name: "auto" or one of `KERNELS`.
        dense, library: other forms of the weight that the layer keeps.

    Raises:
        RuntimeError: x has another width or dtype, as `F.linear` does.
        ValueError: `kernel_name` cannot take this product.
    """
    return compute(x, PackedWeight(values, bits, in_features, pattern, dense, library), bias, kernel_name)


@linear.register_fake
def _(
    x: torch.Tensor,
    values: torch.Tensor,
    bits: torch.Tensor,
    bias: torch.Tensor | None,
    in_features: int,
    pattern: str = "",
    kernel_name: str = "auto",
    dense: torch.Tensor | None = None,
    library: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], bits.shape[0])


def runs_plainly(x: torch.Tensor) -> bool:
    """Whether nothing differentiates, traces or compiles: then kernels are called without the operator, which costs
    some 20 microseconds."""
    return (
        type(x) is torch.Tensor
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.device.type != "meta"
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


def apply(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, kernel: str = "auto") -> torch.Tensor:
    """`linear`, without the operator where there is no need of it."""
    if runs_plainly(x):
        return compute(x, weight, bias, kernel)
    values, bits, in_features, pattern, dense, library = weight
    return linear(x, values, bits, bias, in_features, pattern, kernel, dense, library)


def compute(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, kernel: str) -> torch.Tensor:
    """`linear` without autograd."""
    tokens = tokens_of(x, weight)
    if tokens.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], weight.out_features)
    y = run_candidate(choose(weight, tokens.shape[0], kernel), tokens, weight, bias)
    # Not a view for autograd: some models add to a layer's output in place (Falcon, with parallel attention).
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], weight.out_features])


def tokens_of(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x as [tokens, in_features]. Raises RuntimeError where the layer cannot take it."""
    if x.shape[-1] != weight.in_features or x.dtype != weight.values.dtype:
        raise RuntimeError(
            f"x is {x.dtype} {list(x.shape)}, this layer takes {weight.values.dtype} [..., {weight.in_features}]"
        )
    return x.reshape(-1, weight.in_features)


def run_candidate(
    candidate: Candidate, tokens: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """y [tokens, out] by a kernel, with tensors that lie as it needs them."""
    if candidate.kernel not in ("dense", "reference"):  # those take x as it is
        tokens = aligned(tokens)
        weight = weight._replace(values=aligned(weight.values), bits=aligned(weight.bits))
    return candidate.run(tokens, weight, bias)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and beginning at a multiple of 16 bytes, as the kernels' loads need it."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _has_kernel(values: torch.Tensor, bits: torch.Tensor, in_features: int, pattern: str) -> bool:
    problem = Problem(bits.shape[0], in_features, 1, pattern, values.dtype, values.device)
    # In the interpreter kernels run where a test forces them only.
    return values.is_cuda and values.numel() > 0 and KERNELS["decompress"].why_not(problem) is None


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, values, bits, _, ctx.in_features, ctx.pattern, _, dense, _ = inputs
    ctx.values_shape = list(values.shape)
    # The input is needed for the gradient of the weight only: LoRA on frozen weights does not keep it.
    needed = (
        x if ctx.needs_input_grad[1] else None,
        values if ctx.needs_input_grad[0] and dense is None else None,
        dense if ctx.needs_input_grad[0] else None,
    )
    ctx.save_for_backward(*needed, bits)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, values, dense, bits = ctx.saved_tensors
    grad_x = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ (decompress(values, bits, ctx.in_features, ctx.pattern) if dense is None else dense)
    if ctx.needs_input_grad[1]:
        full = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, ctx.in_features)
        grad_values = gather(full, bits, ctx.values_shape, ctx.pattern)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, grad_values, None, grad_bias, None, None, None, None, None


linear.register_autograd(_backward, setup_context=_save)
