"""Products with a low-rank matrix under a mask: y = x·(W∘(B·A))ᵀ, where W is a packed weight or, without values, its
mask alone.

B·A is dense, [out, in]. Here it never is as a whole: it is made a few rows at a time, in the forward and again in the
backward pass, so that training keeps x, A, B and the mask, which are there anyway.

| tensor | shape | meaning |
|---|---|---|
| x | [..., in] | input |
| a, b | [rank, in], [out, rank] | the factors |
| values, bits | as in `packing` | the packed weight; all kept weights are one without values |
| value_scale | as in `quantization` | of quantised values |
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..kernels import PackedWeight, decompress, mm, product_dtype
from ..packing import unpack_mask
from ..quantization import by_column, kept_integers

# Bytes of what a step needs beside its inputs and outputs.
_CHUNK_BYTES = 64 << 20


class _Weight(NamedTuple):
    """W packed, or without values its mask."""

    bits: torch.Tensor
    in_features: int
    values: torch.Tensor | None
    scale: torch.Tensor | None
    group_size: int


class _Rows:
    """Some rows of a weight: of its tensors `part`, of the flat values `of_values`."""

    def __init__(self, part: slice, of_values: slice, weight: _Weight) -> None:
        self.part, self.of_values, self.weight = part, of_values, weight
        self.bits = weight.bits[part]

    def mask(self) -> torch.Tensor:
        return unpack_mask(self.bits, self.weight.in_features)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """These rows of W, of which all kept weights are one where there are no values."""
        _, in_features, values, scale, group_size = self.weight
        if values is None:
            # By a table of bytes, several times faster on a processor than to unpack the mask and to convert it.
            table = _byte_masks(self.bits.device).to(dtype)
            return F.embedding(self.bits.int(), table).flatten(-2)[:, :in_features]
        dense = decompress(values.reshape(-1)[self.of_values].to(dtype), self.bits, in_features)
        return dense if scale is None else dense.mul_(by_column(scale[self.part].to(dtype), group_size, in_features))


def _rows(weight: _Weight, itemsize: int) -> Iterator[_Rows]:
    """Steps of rows for which products, gradients and masks fit the limit. Where the values of an unstructured weight
    are wanted, they must be counted, which a GPU waits for."""
    if weight.values is not None and weight.scale is not None:
        mask = unpack_mask(weight.bits, weight.in_features)
        weight = weight._replace(values=kept_integers(weight.values, mask))
    bits, values = weight.bits, weight.values
    # Two matrices in the dtype, one more on the way, the mask, and its bits.
    step = max(1, _CHUNK_BYTES // (weight.in_features * (3 * itemsize + 3)))
    begin = end = 0
    for start in range(0, bits.shape[0], step):
        part = slice(start, min(start + step, bits.shape[0]))
        if values is not None and values.dim() == 2:
            end = part.stop * values.shape[1]
        elif values is not None:
            end = begin + int(_counts(bits[part]).sum())
        yield _Rows(part, slice(begin, end), weight)
        begin = end


def _counts(bits: torch.Tensor) -> torch.Tensor:
    """How many weights each row keeps, [out]."""
    return _byte_masks(bits.device).sum(1)[bits.long()].sum(1)


def _byte_masks(device: torch.device) -> torch.Tensor:
    """What each byte of a mask keeps, [256, 8] bool."""
    return unpack_mask(torch.arange(256, dtype=torch.uint8, device=device)[:, None], 8)


def masked_linear(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weight: PackedWeight | torch.Tensor, scaling: float = 1.0
) -> torch.Tensor:
    """y = scaling · x·(W∘(B·A))ᵀ; tensors as in the table above, y: [..., out] in the dtype of x.

    Saves x, A, B, and W packed for the backward pass, which gives gradients of x, A, B and of values that are not
    quantised. Under autocast, x, A and B are cast as those of `F.linear`.

    Args:
        weight: W packed, or the bits of its mask alone.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together.
    """
    if isinstance(weight, PackedWeight):
        values, bits, _, _, _, value_scale, group_size = weight
    else:
        values, bits, value_scale, group_size = None, weight, None, 0
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
    return _masked_linear(x, a, b, bits, values, value_scale, group_size, scaling)


@torch.library.custom_op("ksparse::masked_linear", mutates_args=())
def _masked_linear(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bits: torch.Tensor,
    values: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    group_size: int,
    scaling: float,
) -> torch.Tensor:
    in_features = a.shape[1]
    tokens = x.reshape(-1, in_features)
    y = x.new_empty(tokens.shape[0], b.shape[0])
    for rows in _rows(_Weight(bits, in_features, values, value_scale, group_size), x.element_size()):
        product = mm(b[rows.part] * scaling, a)
        product *= rows.dense(x.dtype)
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
    value_scale: torch.Tensor | None,
    group_size: int,
    scaling: float,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, A, B and values; empty ones where `needs` says that they are not needed."""
    in_features = a.shape[1]
    tokens, grad = x.reshape(-1, in_features), grad.reshape(-1, b.shape[0])
    exact = torch.promote_types(x.dtype, torch.float32)  # sums over many steps
    grad_x = tokens.new_zeros(tokens.shape if needs[0] else 0, dtype=exact)
    grad_a, grad_b = torch.zeros_like(a, dtype=exact), torch.empty_like(b)
    grad_values = x.new_empty(0) if values is None or not needs[3] else torch.empty_like(values)
    for rows in _rows(_Weight(bits, in_features, values, value_scale, group_size), x.element_size()):
        weight, grad_y, factor = rows.dense(x.dtype), grad[:, rows.part], b[rows.part] * scaling
        if needs[0]:
            grad_x += mm(grad_y, mm(factor, a) * weight)
        full = mm(grad_y.T, tokens)
        if needs[3] and values is not None:
            grad_values.view(-1)[rows.of_values] = (mm(factor, a) * full)[rows.mask()].to(values.dtype)
        full *= weight
        grad_a += mm(factor.T, full)
        grad_b[rows.part] = mm(full, a.T) * scaling
    return grad_x.to(x.dtype).view(x.shape if needs[0] else 0), grad_a.to(a.dtype), grad_b, grad_values


@_masked_linear_backward.register_fake
def _(grad: Any, x: Any, a: Any, b: Any, bits: Any, values: Any, *rest: Any) -> tuple[Any, ...]:
    needs = rest[-1]
    of_values = x.new_empty(0) if values is None or not needs[3] else torch.empty_like(values)
    return x.new_empty(x.shape if needs[0] else 0), torch.empty_like(a), torch.empty_like(b), of_values


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.group_size, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    grads = _masked_linear_backward(grad, *ctx.saved_tensors, ctx.group_size, ctx.scaling, needs)
    grad_x, grad_a, grad_b, grad_values = (g if need else None for g, need in zip(grads, needs, strict=True))
    return grad_x, grad_a, grad_b, None, grad_values, None, None, None


_masked_linear.register_autograd(_backward, setup_context=_save)


@torch.no_grad()
def row_norms(weight: PackedWeight, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """‖W + scaling·B·A‖₂ of each row, [out], in the dtype of A and B; not masked. A few rows are dense at a time."""
    values, bits, in_features, _, _, value_scale, group_size = weight
    norms, dtype = a.new_empty(b.shape[0]), product_dtype(a.dtype, a.device)
    a, b = a.to(dtype), b.to(dtype)
    for rows in _rows(_Weight(bits, in_features, values, value_scale, group_size), a.element_size()):
        dense = rows.dense(dtype)
        norms[rows.part] = torch.linalg.vector_norm(dense.addmm_(b[rows.part], a, alpha=scaling), dim=1)
    return norms
