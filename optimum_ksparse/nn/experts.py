"""`SparseExperts`: matrices stacked in one parameter, such as the experts of a layer, each kept packed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

from .. import kernels
from ..packing import check_bits, pack, unpack_mask
from ..pattern import Pattern
from .linear import in_autocast_dtype
from .packed import PackedModule, onloaded

_EAGER = 'run the model with model.set_experts_implementation("eager")'


class SparseExperts(PackedModule):
    """A stack of sparse matrices, stored packed (table in `packing`). It takes the place of a parameter
    [experts, out, in] that a module reads as `F.linear(x, self.<name>[expert])`: `stack[expert]` gives a matrix that
    runs packed. Needs `experts_implementation="eager"`; the others of transformers read the whole parameter.

    Args:
        shape: [experts, out, in], of the dense stack.
        pattern: which weights of a matrix are kept.
        num_values: how many are kept in the whole stack, as many in each matrix; `n:m` fixes it, other
            patterns need it.
        device, dtype: of the tensors, which are left uninitialised.

    Attributes:
        weight: kept values, n:m: [experts, out, in·n/m], otherwise: [experts, nnz of a matrix].
        weight_mask: [experts, out, ceil(in/8)] uint8.
        kernel: as in `PackedModule`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        pattern: Pattern,
        num_values: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.out_features, self.in_features = shape
        self.pattern = pattern
        self._make_tensors((self.num_experts,), num_values, device=device, dtype=dtype)

    @classmethod
    def from_dense(cls, weight: torch.Tensor, mask: torch.Tensor, pattern: Pattern) -> SparseExperts:
        """Packs `weight` [experts, out, in] under `mask` [experts, out, in] (bool, True = kept).

        Raises:
            ValueError: the mask does not fit the weight or the pattern, or keeps more in one matrix than in another.
        """
        pairs = (pack(matrix, kept, pattern) for matrix, kept in zip(weight.detach(), mask, strict=True))
        return cls.from_packed(pairs, weight.shape[-1], pattern, weight.requires_grad)

    @classmethod
    @torch.no_grad()
    def from_packed(
        cls,
        pairs: Iterable[tuple[torch.Tensor, torch.Tensor]],
        in_features: int,
        pattern: Pattern,
        requires_grad: bool = True,
    ) -> SparseExperts:
        """The stack of packed matrices, each the `values` and `bits` that `pack` gives.

        Raises:
            ValueError: the matrices do not keep the same number of weights.
        """
        values, bits = zip(*pairs, strict=True)
        counts = sorted({matrix.numel() for matrix in values})
        if len(counts) > 1:
            raise ValueError(f"matrices of a stack must keep equally many weights, found {counts[0]} to {counts[-1]}")
        shape = len(values), len(bits[0]), in_features
        stack = cls(shape, pattern=pattern, num_values=counts[0] * len(values), device="meta")
        stack.weight = nn.Parameter(torch.stack(values), requires_grad=requires_grad)
        stack.weight_mask = torch.stack(bits)
        stack._prepare()
        return stack

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, expert: int | torch.Tensor) -> PackedMatrix | torch.Tensor:
        if not isinstance(expert, int) and getattr(expert, "shape", None) != ():
            raise TypeError(f"sparse experts are read one by one, by a number; {_EAGER}")
        expert = int(expert)
        if self._dense_weight is not None:
            return self._dense_weight[expert]
        # No forward pass of this module brings in what is offloaded.
        values, bits = (onloaded(self, name)[expert] for name in ("weight", "weight_mask"))
        return PackedMatrix(self._packed(values, bits), self.kernel)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if hasattr(torch.Tensor, name):
                raise AttributeError(
                    f"sparse experts have no dense tensor, whose {name} was asked for; {_EAGER}"
                ) from None
            raise error

    def _packed(self, values: torch.Tensor, bits: torch.Tensor) -> kernels.PackedWeight:
        return kernels.PackedWeight(values, bits, self.in_features, str(self.pattern))

    def _prepare(self) -> None:
        kernels.prepare(self._packed(self.weight[0].detach(), self.weight_mask[0]))

    def to_dense_weight(self) -> torch.Tensor:
        """The weights [experts, out, in] with their zeros."""
        self._check_whole()
        pairs = zip(self.weight.detach(), self.weight_mask, strict=True)
        return torch.stack([kernels.decompress(v, b, self.in_features, str(self.pattern)) for v, b in pairs])

    def to_dense(self) -> nn.Parameter:
        """The dense parameter that this one stands for, with the zeros written out."""
        return nn.Parameter(self.to_dense_weight(), requires_grad=self.weight.requires_grad)

    def _check_bits(self, bits: torch.Tensor, name: str) -> None:
        num_values = self.weight.shape[1:].numel()
        for expert, rows in enumerate(bits):
            check_bits(rows, self.pattern, self.in_features, num_values, f"{name}[{expert}]")

    def extra_repr(self) -> str:
        sizes = f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"
        return sizes + super().extra_repr()


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
