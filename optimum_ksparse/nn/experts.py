"""`SparseExperts`: matrices stacked in one parameter, such as the experts of a layer, each kept packed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .. import kernels
from ..packing import check_bits, pack
from ..pattern import Pattern
from .matrix import PackedMatrix
from .packed import PackedModule, onloaded


class SparseExperts(PackedModule):
    """A stack of sparse matrices, stored packed (table in `packing`). It takes the place of a parameter
    [experts, out, in] that a module reads as `F.linear(x, self.<name>[expert])`: `stack[expert]` gives a matrix that
    runs packed. Needs `experts_implementation="eager"`; the others of transformers read the whole parameter.

    Args:
        num_experts, in_features, out_features: of the stack, and of each matrix.
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
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        pattern: Pattern,
        num_values: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.pattern = pattern
        self._make_tensors((num_experts,), num_values, device=device, dtype=dtype)

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
        sizes = {"in_features": in_features, "out_features": len(bits[0]), "num_values": counts[0] * len(values)}
        stack = cls(len(values), pattern=pattern, device="meta", **sizes)
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
        pairs = zip(self.weight.detach(), self.weight_mask, strict=True)
        return torch.stack([kernels.decompress(v, b, self.in_features, str(self.pattern)) for v, b in pairs])

    def to_dense(self) -> nn.Parameter:
        """The dense parameter that this one stands for, with the zeros written out."""
        return nn.Parameter(self.to_dense_weight(), requires_grad=self.weight.requires_grad)

    def _check_bits(self, bits: torch.Tensor, name: str) -> None:
        for expert, own in enumerate(bits):
            check_bits(own, self.pattern, self.in_features, self.weight[0].numel(), f"{name}[{expert}]")

    def extra_repr(self) -> str:
        sizes = f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"
        return sizes + super().extra_repr()


_EAGER = 'run the model with model.set_experts_implementation("eager")'
