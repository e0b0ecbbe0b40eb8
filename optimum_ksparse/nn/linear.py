"""`SparseLinear`: a linear map that keeps its weight packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import kernels
from ..packing import check_bits, pack, unpack_mask, values_shape
from ..pattern import Pattern
from .foreign import PackedModule

if TYPE_CHECKING:
    from .group import FusedGroup


def is_linear_map(module: nn.Module) -> bool:
    """True for `nn.Linear`, its subclasses, and GPT-2's `Conv1D`."""
    return isinstance(module, nn.Linear | Conv1D)


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight [out, in] of a dense linear map; `Conv1D` stores the transpose."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight  # type: ignore[return-value]


def in_autocast_dtype(
    x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Input, packed values and bias as autocast would cast those of `F.linear`."""
    device = x.device.type
    # The meta device has no autocast, and torch 2.11 cannot trace the question whether a device has.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x, values, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)


class SparseLinear(PackedModule, nn.Linear):
    """y = x·Wᵀ + b with a sparse W that is stored packed (table in `packing`).

    Runs in float32, bfloat16 and float16 on any device, under autocast and `torch.compile`: 2:4 and 4:8 in 16 bit on
    NVIDIA GPUs from Ampere on by kernels that read the packed weight (`kernels`), everything else by decompressing it
    in the forward pass. Its weight trains like any other: the gradient has the shape of the packed values, so that
    zeros stay zero under any optimizer.

    Args:
        in_features, out_features, bias: as in `nn.Linear`.
        pattern: which weights are kept.
        num_values: how many are kept; `n:m` fixes it, other patterns need it.
        dense_type: class of the module it stands for, which `to_dense` gives back (`nn.Linear`, a subclass, `Conv1D`).
        device, dtype: of the parameters, which are left uninitialised.

    Attributes:
        weight: kept values, n:m: [out, in·n/m], otherwise: [nnz].
        weight_mask: [out, ceil(in/8)] uint8.
        bias: [out] or None.
        kernel: how to compute: "auto" (what was measured to be fastest), or one of `kernels.KERNELS`.
        densify: "never", or "lazy": the first forward pass without gradients of the weight keeps it dense in memory,
            and the passes after it run as those of `nn.Linear`.
    """

    weight_mask: torch.Tensor
    kernel: str = "auto"
    densify: str = "never"
    # The dense weight, which the forward pass uses as it is: set by `densified` for a while, by `densify="lazy"` to
    # stay.
    _dense_weight: torch.Tensor | None = None
    # Other forms of the weight, for the dispatch to choose; set by `keep_form`.
    _dense_form: torch.Tensor | None = None
    _library_form: torch.Tensor | None = None
    # The state of the packed weight of which the forms were made.
    _formed: tuple[int, int] | None = None
    # Layers that read the same input and run as one product, and the number of this one; set by `fusing`. The first of
    # them knows the others, which do not know it: a circle would keep a deleted model in memory.
    _group: tuple[FusedGroup, int] | None = None
    _followers: tuple[SparseLinear, ...] = ()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pattern: Pattern,
        num_values: int | None = None,
        dense_type: type[nn.Module] = nn.Linear,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear would make, and initialise, a dense weight
        self.in_features, self.out_features = in_features, out_features
        self.pattern = pattern
        self.dense_type = dense_type
        if num_values is None:
            if pattern.m is None or pattern.n is None:
                raise ValueError(f"num_values must be given for pattern {pattern}, which does not fix it")
            num_values = out_features * in_features // pattern.m * pattern.n
        shape = values_shape(pattern, out_features, in_features, num_values)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        bits = torch.empty(out_features, -(-in_features // 8), device=device, dtype=torch.uint8)
        self.register_buffer("weight_mask", bits)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None  # type: ignore[assignment]

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls,
        linear: nn.Module,
        mask: torch.Tensor,
        pattern: Pattern | None = None,
        weight: torch.Tensor | None = None,
    ) -> SparseLinear:
        """Packs a dense linear map.

        Args:
            linear: `nn.Linear`, a subclass, or `Conv1D`; is not changed.
            mask: [out, in] bool, True where the weight is kept.
            pattern: the mask's pattern; None means unstructured, with the mask's own density.
            weight: [out, in], used instead of the module's own (an updated weight).

        Raises:
            TypeError: `linear` is not a dense linear map.
            ValueError: the mask does not fit the weight or the pattern.
        """
        if not is_linear_map(linear) or isinstance(linear, cls):
            raise TypeError(f"linear must be a dense nn.Linear or Conv1D, found {type(linear).__name__}")
        weight = dense_weight(linear) if weight is None else weight
        if weight.shape != dense_weight(linear).shape:
            raise ValueError(f"weight is {list(weight.shape)}, the module's is {list(dense_weight(linear).shape)}")
        mask = mask.to(weight.device, torch.bool)
        kept = int(mask.sum())
        if pattern is None:
            if not 0 < kept < mask.numel():
                raise ValueError(f"mask keeps {kept} of {mask.numel()} weights: give the pattern")
            pattern = Pattern(f"{mask.numel() - kept}/{mask.numel()}")
        values, bits = pack(weight, mask, pattern)
        sparse = cls(
            weight.shape[1],
            weight.shape[0],
            linear.bias is not None,
            pattern=pattern,
            num_values=kept,
            dense_type=type(linear),
            device="meta",
        )
        source = linear.weight
        sparse.weight = nn.Parameter(values, requires_grad=source.requires_grad)  # type: ignore[arg-type]
        sparse.weight_mask = bits
        if linear.bias is not None:
            sparse.bias = linear.bias  # type: ignore[assignment]
        kernels.prepare(sparse.packed())
        return sparse.train(linear.training)

    @classmethod
    def empty_like(
        cls, linear: nn.Module, pattern: Pattern, num_values: int, device: torch.device | str | None = None
    ) -> SparseLinear:
        """One that stands for `linear`, with its bias, on its device or on another one, and with a weight still to be
        filled in.

        Raises:
            ValueError: `num_values` cannot be right for this pattern and shape.
        """
        out_features, in_features = dense_weight(linear).shape
        source: torch.Tensor = linear.weight  # type: ignore[assignment]
        sparse = cls(
            in_features,
            out_features,
            linear.bias is not None,
            pattern=pattern,
            num_values=num_values,
            dense_type=type(linear),
            device=source.device if device is None else device,
            dtype=source.dtype,
        )
        sparse.weight.requires_grad_(source.requires_grad)
        if device is None and linear.bias is not None:
            sparse.bias = linear.bias  # type: ignore[assignment]
        return sparse.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._formed is not None and not torch.compiler.is_compiling() and self._formed != self._state():
            self.drop_forms()  # the weight has been trained or loaded since
        # Other forms than the packed one would swallow the gradient of the weight.
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        if self.densify == "lazy" and self._dense_weight is None and not trains and self._may_densify():
            self._dense_weight, self._formed = self.to_dense_weight(), self._state()
        if self._dense_weight is not None and not trains:
            return F.linear(x, self._dense_weight, self.bias)
        if self._group is not None and not torch.is_grad_enabled() and self._formed is None:
            group, index = self._group
            y = group.output(index, x, (self, *self._followers))
            if y is not None:
                return y
        values, bias, dense, library = self.weight, self.bias, self._dense_form, self._library_form
        x, values, bias = in_autocast_dtype(x, values, bias)  # type: ignore[assignment]
        if values.dtype != self.weight.dtype:
            dense = library = None
        if trains:
            dense = library = None
        weight = kernels.PackedWeight(values, self.weight_mask, self.in_features, str(self.pattern), dense, library)
        return kernels.apply(x, weight, bias, self.kernel)

    def keep_form(self, name: str, form: torch.Tensor, shared: torch.Tensor | None = None) -> None:
        """Keeps another form of the weight for the kernel of that name: "dense" [out, in], or "library", of which
        `shared` may be a view that equals the packed values and takes their place. Forms go when the weight changes,
        or moves, or loads."""
        if shared is not None:
            self.weight.data = shared
        setattr(self, f"_{name}_form", form)
        self._formed = self._state()

    def packed(self) -> kernels.PackedWeight:
        """The packed weight with the forms that are kept beside it, for the dispatch."""
        pattern, forms = str(self.pattern), (self._dense_form, self._library_form)
        return kernels.PackedWeight(self.weight.detach(), self.weight_mask, self.in_features, pattern, *forms)

    def drop_forms(self) -> None:
        """Forgets all other forms of the weight than the packed one."""
        if self._library_form is not None and self._shares_storage(self._library_form):
            self.weight.data = self.weight.data.clone()
        self._dense_weight = self._dense_form = self._library_form = self._formed = None

    def replace_values(self, values: torch.Tensor) -> None:
        """Takes other packed values, of the shape, dtype and device of the present ones, for the same mask; the
        parameter stays the same object."""
        self._part()
        self.weight.data = values

    def _part(self) -> None:
        """Forgets what other tensors the weight shares its memory with."""
        self.drop_forms()
        if self._group is not None:
            self._group[0].part()

    @property
    def extra_bytes(self) -> int:
        """Bytes of other forms of the weight that are kept beside the packed one."""
        forms = [form for form in (self._dense_weight, self._dense_form, self._library_form) if form is not None]
        shared = self._library_form is not None and self._shares_storage(self._library_form)
        return sum(form.nbytes for form in forms) - shared * self.weight.nbytes

    def _shares_storage(self, form: torch.Tensor) -> bool:
        return form.untyped_storage().data_ptr() == self.weight.untyped_storage().data_ptr()

    def _may_densify(self) -> bool:
        """Not where accelerate brings the weight in for a forward pass only."""
        offloaded = getattr(getattr(self, "_hf_hook", None), "offload", False)
        return not (offloaded or self.weight.is_meta or torch.compiler.is_compiling())

    def _state(self) -> tuple[int, int]:
        """Changes when the packed weight is written to or replaced."""
        return self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version

    def _apply(self, *args: Any, **kwargs: Any) -> SparseLinear:
        self._part()
        super()._apply(*args, **kwargs)
        kernels.prepare(self.packed())
        return self

    def __getstate__(self) -> dict[str, Any]:
        run_time = ("_dense_weight", "_dense_form", "_library_form", "_formed", "_group", "_followers")
        return {name: value for name, value in self.__dict__.items() if name not in run_time}

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return self.weight.numel() / (self.in_features * self.out_features)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weight, were it dense in its dtype."""
        return self.in_features * self.out_features * self.weight.element_size()

    @property
    def packed_bytes(self) -> int:
        """Bytes of values and mask."""
        return self.weight.nbytes + self.weight_mask.nbytes

    def to_dense_weight(self) -> torch.Tensor:
        """The weight [out, in] with its zeros."""
        return kernels.decompress(self.weight.detach(), self.weight_mask, self.in_features, str(self.pattern))

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """A dense module of the class that this one stands for, with the zeros written out."""
        conv1d = issubclass(self.dense_type, Conv1D)
        with torch.device("meta"):
            if conv1d:
                dense: nn.Module = Conv1D(self.out_features, self.in_features)
            else:
                dense = self.dense_type(self.in_features, self.out_features, bias=self.bias is not None)
        weight = self.to_dense_weight()
        dense.weight = nn.Parameter(
            weight.T.contiguous() if conv1d else weight, requires_grad=self.weight.requires_grad
        )
        dense.bias = self.bias
        return dense.train(self.training)

    def check_mask(self, name: str) -> None:
        """Raises ValueError, naming the module `name`, where the mask does not fit the values or the pattern."""
        check_bits(self.weight_mask, self.pattern, self.in_features, self.weight.numel(), f"{name}.weight_mask")
        kernels.prepare(self.packed())

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *rest: Any
    ) -> None:
        error_messages = rest[-1]
        self._part()
        try:
            state_dict = self._packed(state_dict, prefix)
        except ValueError as error:
            error_messages.append(str(error))
            return
        bits = state_dict.get(f"{prefix}weight_mask")
        if bits is not None and bits.shape == self.weight_mask.shape and bits.device.type != "meta":
            try:
                check_bits(bits, self.pattern, self.in_features, self.weight.numel(), f"{prefix}weight_mask")
            except ValueError as error:
                error_messages.append(str(error))
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)

    def _packed(self, state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        """A state dict that may come from dense storage, with this layer's weight gathered at its mask."""
        weight = state_dict.get(f"{prefix}weight")
        dense_shape = (self.out_features, self.in_features)
        if weight is not None and issubclass(self.dense_type, Conv1D):
            weight = weight.T
        if weight is None or f"{prefix}weight_mask" in state_dict or tuple(weight.shape) != dense_shape:
            return state_dict
        mask = unpack_mask(self.weight_mask, self.in_features).to(weight.device)
        if bool((weight[~mask] != 0).any()):
            raise ValueError(f"{prefix}weight is dense and not zero where this layer's mask is")
        packed = {f"{prefix}weight": weight[mask].view(self.weight.shape), f"{prefix}weight_mask": self.weight_mask}
        return {**state_dict, **packed}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.pattern}, density={self.density:.4f}"
