"""Products with a low-rank matrix under a mask: y = x·(W∘(B·A))ᵀ, where W is a packed weight or, without values, its
mask alone.

B·A is dense, [out, in]. Here it never is as a whole: it is made a few rows at a time, in the forward and again in the
backward pass, so that training keeps x, A, B and the mask, which are there anyway.

| tensor | shape | meaning |
|---|---|---|
| x | [..., in] | input |
| a, b | [rank, in], [out, rank] | the factors |
| values, bits | as in `packing` | the packed weight; all kept weights are one without values |
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels import decompress, mm, product_dtype
from ..packing import unpack_mask

# Bytes of what a step needs beside its inputs and outputs.
_CHUNK_BYTES = 64 << 20


class _Rows:
    """Some rows of a packed weight: of its tensors `part`, of the flat values `of_values`."""

    def __init__(self, part: slice, of_values: slice, bits: torch.Tensor, in_features: int) -> None:
        self.part, self.of_values, self.in_features = part, of_values, in_features
        self.bits = bits[part]

    def mask(self) -> torch.Tensor:
        return unpack_mask(self.bits, self.in_features)

    def dense(self, values: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """These rows of W, of which all kept weights are one where there are no values."""
        if values is None:
            # By a table of bytes, several times faster on a processor than to unpack the mask and to convert it.
            table = _byte_masks(self.bits.device).to(dtype)
            return F.embedding(self.bits.int(), table).flatten(-2)[:, : self.in_features]
        return decompress(values.reshape(-1)[self.of_values].to(dtype), self.bits, self.in_features)


def _rows(
    bits: torch.Tensor, in_features: int, itemsize: int, values_shape: torch.Size | None = None
) -> Iterator[_Rows]:
    """Steps of rows for which products, gradients and masks fit the limit. Where the values of an unstructured weight
    are wanted, they must be counted, which a GPU waits for."""
    # Two matrices in the dtype, one more on the way, the mask, and its bits.
    step = max(1, _CHUNK_BYTES // (in_features * (3 * itemsize + 3)))
    begin = end = 0
    for start in range(0, bits.shape[0], step):
        part = slice(start, min(start + step, bits.shape[0]))
        if values_shape is not None and len(values_shape) == 2:
            end = part.stop * values_shape[1]
        elif values_shape is not None:
            end = begin + int(_counts(bits[part]).sum())
        yield _Rows(part, slice(begin, end), bits, in_features)
        begin = end


def _counts(bits: torch.Tensor) -> torch.Tensor:
    """How many weights each row keeps, [out]."""
    return _byte_masks(bits.device).sum(1)[bits.long()].sum(1)


def _byte_masks(device: torch.device) -> torch.Tensor:
    """What each byte of a mask keeps, [256, 8] bool."""
    return unpack_mask(torch.arange(256, dtype=torch.uint8, device=device)[:, None], 8)


def masked_linear(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bits: torch.Tensor,
    values: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """y = scale · x·(W∘(B·A))ᵀ; tensors as in the table above, y: [..., out] in the dtype of x.

    Saves x, A, B, bits and values for the backward pass, which gives gradients of x, A, B and values. Under autocast,
    x, A and B are cast as those of `F.linear`.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together.
    """
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
    fits = x.shape[-1] == a.shape[1] and b.shape == (bits.shape[0], a.shape[0])
    alike = x.dtype == a.dtype == b.dtype and x.device == a.device == b.device == bits.device
    if not (fits and alike):
        tensors = ", ".join(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            for name, tensor in (("x", x), ("A", a), ("B", b), ("the mask", bits))
        )
        raise RuntimeError(
            f"{tensors}; needed are one dtype, one device and [..., in], [rank, in], [{bits.shape[0]}, rank]"
        )
    return _masked_linear(x, a, b, bits, values, scale)


@torch.library.custom_op("ksparse::masked_linear", mutates_args=())
def _masked_linear(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bits: torch.Tensor, values: torch.Tensor | None, scale: float
) -> torch.Tensor:
    in_features = a.shape[1]
    tokens = x.reshape(-1, in_features)
    y = x.new_empty(tokens.shape[0], b.shape[0])
    for rows in _rows(bits, in_features, x.element_size(), None if values is None else values.shape):
        product = mm(b[rows.part] * scale, a)
        product *= rows.dense(values, x.dtype)
        y[:, rows.part] = mm(tokens, product.T)
    return y.view(*x.shape[:-1], b.shape[0])


@_masked_linear.register_fake
def _(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], b.shape[0])


@torch.library.custom_op("ksparse::masked_linear_backward", mutates_args=())
def _masked_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bits: torch.Tensor,
    values: torch.Tensor | None,
    scale: float,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, A, B and values; empty ones where `needs` says that they are not needed."""
    in_features = a.shape[1]
    tokens, grad = x.reshape(-1, in_features), grad.reshape(-1, b.shape[0])
    exact = torch.promote_types(x.dtype, torch.float32)  # sums over many steps
    grad_x = tokens.new_zeros(tokens.shape if needs[0] else 0, dtype=exact)
    grad_a, grad_b = torch.zeros_like(a, dtype=exact), torch.empty_like(b)
    grad_values = x.new_empty(0) if values is None or not needs[3] else torch.empty_like(values)
    for rows in _rows(bits, in_features, x.element_size(), None if values is None else values.shape):
        weight, grad_y, factor = rows.dense(values, x.dtype), grad[:, rows.part], b[rows.part] * scale
        if needs[0]:
            grad_x += mm(grad_y, mm(factor, a) * weight)
        full = mm(grad_y.T, tokens)
        if needs[3] and values is not None:
            grad_values.view(-1)[rows.of_values] = (mm(factor, a) * full)[rows.mask()].to(values.dtype)
        full *= weight
        grad_a += mm(factor.T, full)
        grad_b[rows.part] = mm(full, a.T) * scale
    return grad_x.to(x.dtype).view(x.shape if needs[0] else 0), grad_a.to(a.dtype), grad_b, grad_values


@_masked_linear_backward.register_fake
def _(grad: Any, x: Any, a: Any, b: Any, bits: Any, values: Any, scale: float, needs: list[bool]) -> tuple[Any, ...]:
    of_values = x.new_empty(0) if values is None or not needs[3] else torch.empty_like(values)
    return x.new_empty(x.shape if needs[0] else 0), torch.empty_like(a), torch.empty_like(b), of_values


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, a, b, bits, values = ctx.saved_tensors
    need_x, need_a, need_b, _, need_values, _ = ctx.needs_input_grad
    needs = [need_x, need_a, need_b, need_values]
    grads = _masked_linear_backward(grad, x, a, b, bits, values, ctx.scale, needs)
    grad_x, grad_a, grad_b, grad_values = (g if need else None for g, need in zip(grads, needs, strict=True))
    return grad_x, grad_a, grad_b, None, grad_values, None


_masked_linear.register_autograd(_backward, setup_context=_save)


@torch.no_grad()
def row_norms(
    values: torch.Tensor, bits: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """‖W + scale·B·A‖₂ of each row, [out], in the dtype of A and B; not masked. A few rows are dense at a time."""
    norms, dtype = a.new_empty(b.shape[0]), product_dtype(a.dtype, a.device)
    a, b = a.to(dtype), b.to(dtype)
    for rows in _rows(bits, a.shape[1], a.element_size(), values.shape):
        weight = rows.dense(values, dtype)
        norms[rows.part] = torch.linalg.vector_norm(weight.addmm_(b[rows.part], a, alpha=scale), dim=1)
    return norms
