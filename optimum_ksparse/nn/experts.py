"""`SparseExperts`: matrices stacked in one parameter, such as the experts of a layer, each kept packed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

from .. import kernels
from ..packing import check_bits, pack
from ..pattern import Pattern
from ..quantization import ROW
from .linear import in_autocast_dtype
from .packed import PackedModule
from .placement import onloaded

# Of a matrix from the right.
MATMUL = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)
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
        values, group_size: as in `SparseLinear`.
        device, dtype: of the tensors, which are left uninitialised.
        transposed: whether the parameter is [experts, in, out], which a module reads as `x @ self.<name>[expert]`, or
            as `torch.bmm(x, self.<name>)`. It is packed as [experts, out, in] all the same.

    Attributes:
        weight: kept values, n:m: [experts, out, in·n/m], otherwise: [experts, nnz of a matrix].
        weight_mask: [experts, out, ceil(in/8)] uint8.
        weight_scale: None, or [experts, out, ceil(in/group_size)].
        num_values, values, group_size, kernel: as in `PackedModule`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        pattern: Pattern,
        num_values: int | None = None,
        values: str | None = None,
        group_size: int = ROW,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.transposed = transposed
        self.num_experts, self.out_features, self.in_features = shape
        self.pattern = pattern
        self._make_tensors((self.num_experts,), num_values, values, group_size, device=device, dtype=dtype)

    @classmethod
    def from_dense(
        cls, weight: torch.Tensor, mask: torch.Tensor, pattern: Pattern, transposed: bool = False
    ) -> SparseExperts:
        """Packs `weight` [experts, out, in] under `mask` [experts, out, in] (bool, True = kept).

        Raises:
            ValueError: the mask does not fit the weight or the pattern, or keeps more in one matrix than in another.
        """
        pairs = zip(weight.detach(), mask, strict=True)
        packed = (kernels.PackedWeight(*pack(w, m, pattern), weight.shape[-1], str(pattern)) for w, m in pairs)
        return cls.from_packed(packed, weight.requires_grad, transposed)

    @classmethod
    @torch.no_grad()
    def from_packed(
        cls, matrices: Iterable[kernels.PackedWeight], requires_grad: bool = True, transposed: bool = False
    ) -> SparseExperts:
        """The stack of packed matrices, of one shape, pattern and dtype.

        Raises:
            ValueError: the matrices do not keep the same number of weights.
        """
        packed = list(matrices)
        counts, first = sorted({matrix.num_values for matrix in packed}), packed[0]
        if len(counts) > 1:
            raise ValueError(f"matrices of a stack must keep equally many weights, found {counts[0]} to {counts[-1]}")
        stack = cls(
            (len(packed), first.out_features, first.in_features),
            pattern=Pattern(first.pattern),
            num_values=counts[0] * len(packed),
            values=first.value_type,
            group_size=first.group_size,
            device="meta",
            transposed=transposed,
        )
        quantised = first.scale is not None
        stack.weight = nn.Parameter(torch.stack([m.values for m in packed]), requires_grad and not quantised)
        stack.weight_mask = torch.stack([m.bits for m in packed])
        if quantised:
            stack.weight_scale = torch.stack([m.scale for m in packed if m.scale is not None])
        stack._prepare()
        return stack

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, expert: int | torch.Tensor) -> PackedMatrix | torch.Tensor:
        if not isinstance(expert, int) and getattr(expert, "shape", None) != ():
            raise TypeError(f"sparse experts are read one by one, by a number; {_EAGER}")
        expert = int(expert)
        if self._dense_weight is not None:
            return self._dense_weight[expert].mT if self.transposed else self._dense_weight[expert]
        # No forward pass of this module brings in what is offloaded.
        return PackedMatrix(self._packed(expert), self.kernel, self.transposed)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.bmm and not kwargs and len(args) == 2 and isinstance(args[1], cls) and args[1].transposed:
            x, stack = args
            return torch.stack([rows @ stack[expert] for expert, rows in enumerate(x)])
        raise TypeError(f"sparse experts are read one by one, by a number; {_EAGER}")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if hasattr(torch.Tensor, name):
                raise AttributeError(
                    f"sparse experts have no dense tensor, whose {name} was asked for; {_EAGER}"
                ) from None
            raise error

    def _packed(self, expert: int, read: Callable[[nn.Module, str], torch.Tensor] = onloaded) -> kernels.PackedWeight:
        values, bits = (read(self, name)[expert] for name in ("weight", "weight_mask"))
        scale = None if self.weight_scale is None else read(self, "weight_scale")[expert]
        return kernels.PackedWeight(values, bits, self.in_features, self.pattern.text, None, scale, self.group_size)

    def _prepare(self) -> None:
        kernels.prepare(self._packed(0, getattr))

    def to_dense_weight(self) -> torch.Tensor:
        """The weights [experts, out, in] with their zeros."""
        self._check_whole()
        packed = [self._packed(expert) for expert in range(self.num_experts)]
        return torch.stack([kernels.decompress(*m[:4], m.scale, m.group_size) for m in packed]).detach()

    def to_dense(self) -> nn.Parameter:
        """The dense parameter that this one stands for, with the zeros written out."""
        trains = self.weight.requires_grad or self.values is not None
        return nn.Parameter(self._as_parameter(self.to_dense_weight()), requires_grad=trains)

    def _as_parameter(self, weight: torch.Tensor) -> torch.Tensor:
        """[experts, out, in] as the parameter has it."""
        return weight.mT.contiguous() if self.transposed else weight

    def _check_bits(self, bits: torch.Tensor, name: str) -> None:
        num_values = self.num_values // self.num_experts
        for expert, rows in enumerate(bits):
            check_bits(rows, self.pattern, self.in_features, num_values, f"{name}[{expert}]")

    def extra_repr(self) -> str:
        sizes = f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"
        return sizes + super().extra_repr()


class PackedMatrix:
    """A sparse matrix [out, in]. `F.linear` computes with it as a `SparseLinear` does; whatever else is done with it
    is done with its dense weight, through which gradients reach the packed values."""

    def __init__(self, weight: kernels.PackedWeight, kernel: str, transposed: bool = False) -> None:
        self._weight, self._kernel, self._transposed = weight, kernel, transposed

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            x, matrix, bias = _linear_arguments(*args, **(kwargs or {}))
            if isinstance(matrix, cls) and isinstance(x, torch.Tensor):
                return matrix._linear(x, bias)
        if func in MATMUL and len(args) == 2 and isinstance(args[0], torch.Tensor):
            x, matrix = args
            if matrix._transposed:
                return matrix._linear(x, None)
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
        x, weight, bias = in_autocast_dtype(x, self._weight.to(x.device), bias)
        return kernels.apply(x, weight, bias, self._kernel)

    def to_dense(self) -> torch.Tensor:
        """The matrix [out, in], or [in, out] of a transposed stack, with its zeros."""
        dense = kernels.differentiable(self._weight)
        return dense.mT if self._transposed else dense


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias
