"""`PackedMatrix`: a packed weight that `F.linear` takes in the place of a dense one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from .. import kernels
from ..packing import unpack_mask
from .linear import in_autocast_dtype


class PackedMatrix:
    """A sparse matrix [out, in]. `F.linear` computes with it as a `SparseLinear` does; whatever else is done with it
    is done with its dense weight, through which gradients reach the packed values."""

    def __init__(self, weight: kernels.PackedWeight, kernel: str) -> None:
        self._weight, self._kernel = weight, kernel

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            x, matrix, bias = _linear_arguments(*args, **(kwargs or {}))
            if isinstance(matrix, cls) and isinstance(x, torch.Tensor):
                return matrix._linear(x, bias)
        args, kwargs = tree_map_only(cls, lambda matrix: matrix.to_dense(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.to_dense(), name)

    def __matmul__(self, other: torch.Tensor) -> torch.Tensor:
        return self.to_dense() @ other

    def _linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # Tensors that accelerate has offloaded come to where they are needed.
        values, bits = self._weight.values.to(x.device), self._weight.bits.to(x.device)
        x, values, bias = in_autocast_dtype(x, values, bias)
        return kernels.apply(x, self._weight._replace(values=values, bits=bits), bias, self._kernel)

    def to_dense(self) -> torch.Tensor:
        """The matrix [out, in] with its zeros."""
        values, bits, in_features = self._weight[:3]
        dense = values.new_zeros(bits.shape[0], in_features)
        return dense.masked_scatter(unpack_mask(bits, in_features), values)


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias
