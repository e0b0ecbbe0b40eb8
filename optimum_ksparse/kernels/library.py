"""torch's semi-structured tensors (cuSPARSELt), as a second form of a 2:4 weight for products with many tokens.

Its packed form is one tensor: the kept values in our order, then metadata in the library's own. So where the values
are the same to the bit, both forms share them, and the second one costs its metadata alone.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F

from ..packing import unpack


def library_form(values: torch.Tensor, bits: torch.Tensor, in_features: int) -> torch.Tensor:
    """The library's packed form [elements] of a packed 2:4 weight on a CUDA device."""
    return torch._cslt_compress(unpack(values, bits, in_features))


def shared_values(form: torch.Tensor, values: torch.Tensor) -> torch.Tensor | None:
    """The view of `form` that can stand for `values`; None where the library has other ones (it chooses places itself
    where a kept value is zero)."""
    head = form.flatten()[: values.numel()].view(values.shape)
    return head if torch.equal(head.view(torch.int16), values.view(torch.int16)) else None


def library_linear(x: torch.Tensor, form: torch.Tensor, bias: torch.Tensor | None, out_features: int) -> torch.Tensor:
    """y [tokens, out] of x [tokens, in]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the class is a prototype
        weight = torch.sparse.SparseSemiStructuredTensorCUSPARSELT(
            torch.Size((out_features, x.shape[1])), form, None, None, None, None
        )
    return F.linear(x, weight, bias)
