"""`SparseExperts`: matrices stacked in one parameter, such as the experts of a layer, each kept packed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .. import kernels
from ..packing import check_bits, pack, values_shape
from ..pattern import Pattern
from .foreign import PackedModule
from .matrix import PackedMatrix


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
        kernel, densify: as in `SparseLinear`.
    """

    weight_mask: torch.Tensor
    kernel: str = "auto"
    densify: str = "never"
    # The dense stack, whose slices are used as they are: set by `densified` for a while, by `densify="lazy"` to stay;
    # for the latter the state of the packed weight of which it was made.
    _dense_weight: torch.Tensor | None = None
    _formed: tuple[int, int] | None = None

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
        if num_values is None:
            if pattern.m is None or pattern.n is None:
                raise ValueError(f"num_values must be given for pattern {pattern}, which does not fix it")
            num_values = num_experts * (out_features * in_features // pattern.m * pattern.n)
        if not isinstance(num_values, int) or num_values % num_experts:
            raise ValueError(f"num_values is {num_values!r}, which {num_experts} matrices cannot share equally")
        shape = values_shape(pattern, out_features, in_features, num_values // num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))
        bits = torch.empty(num_experts, out_features, -(-in_features // 8), device=device, dtype=torch.uint8)
        self.register_buffer("weight_mask", bits)

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
        if self._formed is not None and self._formed != self._state():
            self.drop_forms()  # the weight has been trained or loaded since
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        if self.densify == "lazy" and self._dense_weight is None and not trains and self._may_densify():
            self._dense_weight, self._formed = self.to_dense_weight(), self._state()
        if self._dense_weight is not None and not trains:
            return self._dense_weight[expert]
        return PackedMatrix(
            self._packed(self._tensor("weight")[expert], self._tensor("weight_mask")[expert]), self.kernel
        )

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

    def _tensor(self, name: str) -> torch.Tensor:
        """The tensor, wherever accelerate has offloaded it: no forward pass of this module brings it in."""
        tensor: torch.Tensor = getattr(self, name)
        hook: Any = getattr(self, "_hf_hook", None)
        return hook.weights_map[name] if tensor.is_meta and getattr(hook, "offload", False) else tensor

    def _may_densify(self) -> bool:
        return not (self.weight.is_meta or torch.compiler.is_compiling())

    def _state(self) -> tuple[int, int]:
        """Changes when the packed weight is written to or replaced."""
        return self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version

    def drop_forms(self) -> None:
        """Forgets the dense form of the weight."""
        self._dense_weight = self._formed = None

    def _prepare(self) -> None:
        kernels.prepare(self._packed(self.weight[0].detach(), self.weight_mask[0]))

    def _apply(self, *args: Any, **kwargs: Any) -> SparseExperts:
        self.drop_forms()
        super()._apply(*args, **kwargs)
        self._prepare()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_dense_weight", "_formed")}

    @property
    def shape(self) -> torch.Size:
        """[experts, out, in], as of the dense parameter."""
        return torch.Size((self.num_experts, self.out_features, self.in_features))

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return self.weight.numel() / self.shape.numel()

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weights, were they dense in their dtype."""
        return self.shape.numel() * self.weight.element_size()

    @property
    def packed_bytes(self) -> int:
        """Bytes of values and masks."""
        return self.weight.nbytes + self.weight_mask.nbytes

    @property
    def extra_bytes(self) -> int:
        """Bytes of the dense form that is kept beside the packed one."""
        return 0 if self._dense_weight is None else self._dense_weight.nbytes

    def to_dense_weight(self) -> torch.Tensor:
        """The weights [experts, out, in] with their zeros."""
        pairs = zip(self.weight.detach(), self.weight_mask, strict=True)
        return torch.stack([kernels.decompress(v, b, self.in_features, str(self.pattern)) for v, b in pairs])

    def to_dense(self) -> nn.Parameter:
        """The dense parameter that this one stands for, with the zeros written out."""
        return nn.Parameter(self.to_dense_weight(), requires_grad=self.weight.requires_grad)

    def check_mask(self, name: str) -> None:
        """Raises ValueError, naming the module `name`, where a mask does not fit the values or the pattern."""
        self._check_bits(self.weight_mask, f"{name}.weight_mask")
        self._prepare()

    def _check_bits(self, bits: torch.Tensor, name: str) -> None:
        for expert, own in enumerate(bits):
            check_bits(own, self.pattern, self.in_features, self.weight[0].numel(), f"{name}[{expert}]")

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *rest: Any
    ) -> None:
        self.drop_forms()
        bits = state_dict.get(f"{prefix}weight_mask")
        if bits is not None and bits.shape == self.weight_mask.shape and bits.device.type != "meta":
            try:
                self._check_bits(bits, f"{prefix}weight_mask")
            except ValueError as error:
                rest[-1].append(str(error))
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)

    def extra_repr(self) -> str:
        sizes = f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, pattern={self.pattern}, density={self.density:.4f}"


_EAGER = 'run the model with model.set_experts_implementation("eager")'
