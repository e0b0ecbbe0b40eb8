"""In which dtype matrix products run on this CPU.

A CPU without instructions for bfloat16 or float16 has no fast product in them: torch takes from 6 to 500 times as long
as in float32 (pytorch issue 146508), but for one token, where reading the weight is what takes time. There the factors
are widened to float32, the second one a panel of columns at a time, so that no large weight is ever held in float32.
torch sums such products in float32 in any case, and the result is rounded to the dtype of the factors, so that figures
differ by the order of summation alone.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

# Of a panel in float32. Narrower ones take longer with many tokens, wider ones with few, for fresh memory.
_PANEL_BYTES = 16 << 20
# With more tokens at a time each processor reads rows that another one has just written. Products in tiles (AMX) take
# twice as long in such parts.
_CPU_TOKENS = 256
# Operator → the places of its factors [..., rows, inner] and [..., inner, columns] among its arguments.
_PRODUCTS = {
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::baddbmm": (1, 2),
    "aten::_grouped_mm": (0, 1),
    "transformers::grouped_mm_fallback": (0, 1),
}
# Operators whose arguments are widened as they are → how many of their outputs, the first ones, have their dtype.
_WHOLE = {
    "aten::convolution": 1,
    "aten::convolution_backward": 3,
    "aten::_scaled_dot_product_flash_attention_for_cpu": 1,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": 3,
}
# What is taken apart into the operators above, but under `torch.inference_mode()` not before a mode sees it.
_COMPOSITE = {
    *("aten::linear", "aten::matmul", "aten::einsum", "aten::conv1d", "aten::conv2d"),
    *("aten::scaled_dot_product_attention", "aten::_scaled_dot_product_attention_math"),
}
# dtype → the operator that says whether oneDNN, to which torch leaves such products, has them on this CPU.
_ONEDNN = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU, and this build of torch, have fast products in bfloat16 or float16."""
    supported = getattr(torch.ops.mkldnn, _ONEDNN[dtype], None)
    if supported is None or not torch.backends.mkldnn.is_available() or not supported():
        return False
    if dtype is not torch.bfloat16 or platform.machine() not in ("x86_64", "AMD64"):
        return True
    # oneDNN has such products on AVX-512 without instructions for them too, in four times the time of float32.
    instructions = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    return any(known is None or known() for known in instructions)


@functools.cache
def _has_tiles() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which this package runs products of tensors of `dtype` on a device: float32 where a CPU has no fast
    products in `dtype`."""
    return torch.float32 if dtype in _ONEDNN and device.type == "cpu" and not _multiplies(dtype) else dtype


def fast_products(module: nn.Module, dtype: torch.dtype | None = None) -> AbstractContextManager[Any]:
    """Within it, products of passes through a module that is on a CPU, forward and backward, are in `product_dtype`.
    Where that is their dtype already, it does nothing.

    Args:
        module: whose weights say in which dtypes there are products; those that are offloaded may come to a CPU.
        dtype: another one that there is, as under autocast.
    """
    cpu, weights = torch.device("cpu"), [p for p in module.parameters() if p.device.type in ("cpu", "meta")]
    dtypes = {p.dtype for p in weights} | ({dtype} if weights and dtype is not None else set())
    if all(product_dtype(one, cpu) == one for one in dtypes):
        return nullcontext()
    within = any(isinstance(mode, _FastProducts) for mode in _get_current_dispatch_mode_stack())
    return nullcontext() if within else _FastProducts()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` of x [tokens, in] in `product_dtype`; without autograd."""
    if not _is_slow(x):
        return F.linear(x, weight, bias)
    return mm(x, weight.T) if bias is None else _in_panels(torch.addmm, (bias, x, weight.T), {}, 1, 2)


def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [rows, inner] · b [inner, columns] in `product_dtype`; without autograd."""
    return _in_panels(torch.mm, (a, b), {}, 0, 1) if _is_slow(a) else a @ b


def linear_by_rows(
    x: torch.Tensor, dense: Callable[[slice], torch.Tensor], bias: torch.Tensor | None, out_features: int, height: int
) -> torch.Tensor:
    """`F.linear` of x [tokens, in] with a weight of which `dense` makes some rows, `height` at a time; without
    autograd."""
    y = x.new_empty(x.shape[0], out_features)
    tokens = _CPU_TOKENS if x.is_cpu and not (x.dtype is torch.bfloat16 and _has_tiles()) else max(1, len(x))
    for start in range(0, out_features, height):
        rows = slice(start, min(start + height, out_features))
        weight = dense(rows).T
        for part, out in zip(x.split(tokens), y[:, rows].split(tokens), strict=True):
            if bias is None:
                torch.mm(part, weight, out=out)
            else:
                torch.addmm(bias[rows], part, weight, out=out)
    return y


class _FastProducts(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = func.name(), kwargs or {}
        if name in _PRODUCTS and _is_slow(args[_PRODUCTS[name][0]]):
            return _in_panels(func, args, kwargs, *_PRODUCTS[name])
        if name in _WHOLE and product_dtype(args[0].dtype, args[0].device) != args[0].dtype:
            return _whole(func, args, kwargs, _WHOLE[name])
        if name in _COMPOSITE:
            with self:
                return func.decompose(*args, **kwargs)
        return func(*args, **kwargs)


def _is_slow(a: torch.Tensor) -> bool:
    """Whether a product with this first factor is to be widened."""
    return a.shape[-2] > 1 and product_dtype(a.dtype, a.device) != a.dtype


def _in_panels(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], first: int, second: int) -> torch.Tensor:
    """A product with its factors at these places, in float32, rounded to their dtype."""
    wide, b, dtype = [_wide(value) for value in args[:second]], args[second], args[first].dtype
    columns, rest = b.shape[-1], args[second + 1 :]
    width = max(1, _PANEL_BYTES // (32 * max(1, b[..., :1].numel()))) * 8  # grouped products want a multiple
    y: torch.Tensor | None = None
    for start in range(0, max(1, columns), width):
        part = slice(start, start + width)
        added = [value[..., part] if value.dim() and value.shape[-1] == columns else value for value in wide[:first]]
        panel: torch.Tensor = func(*added, *wide[first:], b[..., part].float(), *rest, **kwargs)
        if width >= columns:
            return panel.to(dtype)
        y = panel.new_empty(*panel.shape[:-1], columns, dtype=dtype) if y is None else y
        y[..., part] = panel
    assert y is not None
    return y


def _whole(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: int) -> Any:
    """An operator with all its inputs in float32; so many of its outputs are rounded to their dtype."""
    dtype = args[0].dtype
    result = func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})
    if isinstance(result, torch.Tensor):
        return result.to(dtype)
    return tuple(value.to(dtype) if i < outputs and value is not None else value for i, value in enumerate(result))


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _ONEDNN else value
