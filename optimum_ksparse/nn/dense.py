"""`DenseLinear`: what stays dense in a sparse model, the head above all, computed natively for a few tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import kernels

_LEAST_WEIGHTS = 1 << 20  # of fewer a product takes no longer than its call


class DenseLinear(nn.Linear):
    """An `nn.Linear` that multiplies a few tokens on a CPU by the native code of sparse layers, which reads a weight
    in less time than torch does; with more, with gradients and elsewhere it is what it was. To decode a token a small
    model reads its head most of the time. Modules become it, and `nn.Linear` again, by their class alone."""

    _native: kernels.NativeWeight | None = None  # kept from one forward pass to the next

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self._parameters.get("weight")  # a parametrised one is not among them
        # What is compiled must not come to the rest.
        plain = x.is_cpu and kernels.runs_plainly(x) and not torch.is_autocast_enabled("cpu")
        if plain and weight is not None and 0 < x.numel() <= kernels.most_dense_tokens(x.dtype) * self.in_features:
            native = self._native_of(weight) if x.dtype is weight.dtype else None
            if native is not None and x.shape[-1] == native.in_features:
                return native.linear(x, self.bias)
        return super().forward(x)

    def _native_of(self, weight: torch.Tensor) -> kernels.NativeWeight | None:
        """The weight for native code; None where that cannot read it."""
        # Tensors of other classes (DTensor, quantised ones) may have their numbers elsewhere.
        if type(weight) is not nn.Parameter or not weight.is_cpu or not weight.is_contiguous() or weight.is_neg():
            return None
        native, mask = self._native, kernels.whole_mask(*weight.shape)
        if native is None or not native.is_of(weight, mask):
            native = self._native = kernels.NativeWeight(weight, mask, weight.shape[1])
        return native

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_native"}


def compute_natively(model: nn.Module) -> None:
    """Makes a `DenseLinear` of each large `nn.Linear` under `model`; those of other classes are left alone."""
    for module in model.modules():
        if type(module) is nn.Linear and module.in_features * module.out_features >= _LEAST_WEIGHTS:
            module.__class__ = DenseLinear


def compute_by_torch(model: nn.Module) -> None:
    """Takes back `compute_natively`."""
    for module in model.modules():
        if type(module) is DenseLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
            vars(module).pop("_native", None)
