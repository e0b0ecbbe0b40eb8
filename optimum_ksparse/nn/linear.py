"""`SparseLinear`: a linear map that keeps its weight packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import kernels
from ..packing import check_bits, pack, unpack_mask
from ..pattern import Pattern
from ..quantization import ROW, pack_integers, to_integers
from .packed import PackedModule
from .placement import local


def is_linear_map(module: nn.Module) -> bool:
    """True for `nn.Linear`, its subclasses, and GPT-2's `Conv1D`."""
    return isinstance(module, nn.Linear | Conv1D)


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight [out, in] of a dense linear map; `Conv1D` stores the transpose."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight  # type: ignore[return-value]


def in_autocast_dtype(
    x: torch.Tensor, weight: kernels.PackedWeight, bias: torch.Tensor | None
) -> tuple[torch.Tensor, kernels.PackedWeight, torch.Tensor | None]:
    """Input, packed weight and bias as autocast would cast those of `F.linear`."""
    device = x.device.type
    # The meta device has no autocast, and torch 2.11 cannot trace the question whether a device has.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.cast(dtype), None if bias is None else bias.to(dtype)


class SparseLinear(PackedModule, nn.Linear):
    """y = x·Wᵀ + b with a sparse W that is stored packed (table in `packing`).

    Runs in float32, bfloat16 and float16 on any device, under autocast and `torch.compile`: on CPUs, and 2:4 and 4:8
    in 16 bit on NVIDIA GPUs from Ampere on, by code that reads the packed weight (`kernels`), everywhere else by
    decompressing it in the forward pass. NaN and infinite inputs at weights that are not kept may or may not count.
    Its weight trains like any other: the gradient has the shape of the packed values, so that zeros stay zero under
    any optimizer. Quantised values do not train; gradients reach the input.

    Under the tensor parallelism of transformers values and mask are parameters that are spread over processes: each
    has some rows of both, or some columns, which are whole groups and bytes. `in_features`, `out_features` and the
    shapes of the parameters stay those of the whole layer.

    Args:
        in_features, out_features, bias: as in `nn.Linear`.
        pattern: which weights are kept.
        num_values: how many are kept; `n:m` fixes it, other patterns need it.
        dense_type: class of the module it stands for, which `to_dense` gives back (`nn.Linear`, a subclass, `Conv1D`).
        values: None, or the type of quantised values.
        group_size: how many columns of a row share a scale then; a multiple of 64, or -1: all.
        device, dtype: of the parameters, which are left uninitialised.

    Attributes:
        weight: kept values, n:m: [out, in·n/m], otherwise: [nnz]; of quantised ones as in `quantization`.
        weight_mask: [out, ceil(in/8)] uint8.
        weight_scale: None, or [out, ceil(in/group_size)].
        bias: [out] or None.
        num_values, values, group_size, kernel: as in `PackedModule`.
    """

    # torch's semi-structured form of the weight, which is a view of it then; set by `keep_library_form`.
    _library_form: torch.Tensor | None = None
    _run_time = (*PackedModule._run_time, "_library_form")
    # Of transformers: a layer that is spread over processes computes with what is local.
    _hf_quantized_needs_local_tp = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pattern: Pattern,
        num_values: int | None = None,
        dense_type: type[nn.Module] = nn.Linear,
        values: str | None = None,
        group_size: int = ROW,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear would make, and initialise, a dense weight
        self.in_features, self.out_features = in_features, out_features
        self.pattern = pattern
        self.dense_type = dense_type
        self._make_tensors((), num_values, values, group_size, device=device, dtype=dtype)
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
        packed = kernels.PackedWeight(*pack(weight, mask, pattern), weight.shape[1], str(pattern))
        return cls.from_packed(linear, packed)

    @classmethod
    def from_packed(cls, linear: nn.Module, packed: kernels.PackedWeight) -> SparseLinear:
        """One that stands for `linear`, with its bias, and has this weight."""
        quantisation = {"values": packed.value_type, "group_size": packed.group_size}
        sparse = cls.empty_like(linear, Pattern(packed.pattern), packed.num_values, "meta", **quantisation)
        sparse.weight = nn.Parameter(packed.values, requires_grad=sparse.weight.requires_grad)
        sparse.weight_mask, sparse.weight_scale, sparse.bias = packed.bits, packed.scale, linear.bias  # type: ignore[assignment]
        sparse._prepare()
        return sparse

    @classmethod
    def empty_like(
        cls,
        linear: nn.Module,
        pattern: Pattern,
        num_values: int,
        device: torch.device | str | None = None,
        **quantisation: Any,
    ) -> SparseLinear:
        """One that stands for `linear`, dense or sparse itself, with its bias, on its device or on another one, and
        with a weight still to be filled in; of quantised values with `values` and `group_size`.

        Raises:
            ValueError: `num_values` cannot be right for this pattern and shape.
        """
        out_features, in_features = linear.shape if isinstance(linear, cls) else dense_weight(linear).shape
        source: torch.Tensor = linear.weight  # type: ignore[assignment]
        sparse = cls(
            in_features,
            out_features,
            linear.bias is not None,
            pattern=pattern,
            num_values=num_values,
            dense_type=linear.dense_type if isinstance(linear, cls) else type(linear),
            device=source.device if device is None else device,
            dtype=linear.dtype if isinstance(linear, cls) else source.dtype,
            **quantisation,
        )
        sparse.weight.requires_grad_(source.requires_grad and sparse.values is None)
        if device is None and linear.bias is not None:
            sparse.bias = linear.bias  # type: ignore[assignment]
        return sparse.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parameters = self._parameters
        return self.linear(x, parameters["bias"] if "bias" in parameters else self.bias)  # noqa: SIM401 `self.bias` is slow

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The product with another bias than the module's own."""
        if self._dense_weight is not None:
            return F.linear(x, self._dense_weight, bias)
        # One look-up for all: that of `self.weight` takes half a microsecond. A parametrised weight is not among them.
        tensors: dict[str, Any] = {**self._parameters, **self._buffers}
        plain = x.is_cpu and self.kernel == "auto" and "weight" in tensors
        if plain and kernels.runs_plainly(x) and not torch.is_autocast_enabled("cpu"):
            native = self._native
            # Held while it computes: another thread may replace them.
            weight, bits, scale = tensors["weight"], tensors["weight_mask"], tensors["weight_scale"]
            if native is None or not native.is_of(weight, bits, scale):
                native = self._native = kernels.native_weight(self.packed(), self.kernel)
            if native is not None:
                return native.linear(x, bias)
        packed = self._with(self.weight, self.weight_mask, self.weight_scale)
        x, packed, bias = in_autocast_dtype(x, packed, bias)
        return kernels.apply(x, packed, bias, self.kernel)

    def packed(self) -> kernels.PackedWeight:
        """The packed weight with the form that is kept beside it, for the dispatch; of one that is spread over
        processes, what is local."""
        scale = None if self.weight_scale is None else local(self.weight_scale)
        return self._with(local(self.weight.detach()), local(self.weight_mask), scale)

    def _with(self, values: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor | None) -> kernels.PackedWeight:
        columns, form = self._columns(bits), self._library_form
        return kernels.PackedWeight(values, bits, columns, self.pattern.text, form, scale, self.group_size)

    def _columns(self, bits: torch.Tensor) -> int:
        """How many columns of the weight a mask, or a part of it, covers."""
        return min(self.in_features, 8 * bits.shape[-1])

    def keep_library_form(self, form: torch.Tensor, shared: torch.Tensor) -> None:
        """Keeps torch's semi-structured form of the weight for the kernel of that name. `shared` is a view of it that
        equals the packed values and takes their place, so that it follows what is written into them. It goes when the
        module moves or loads, and is not used where the weight is replaced."""
        self.weight.data = shared
        self._library_form = form

    def drop_library_form(self) -> None:
        """Gives back the memory of the form that `keep_library_form` keeps."""
        if self.packed().has_library:
            self.weight.data = self.weight.data.clone()
        self._library_form = None

    def replace_values(self, values: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Takes other packed values, of the shape, dtype and device of the present ones, for the same mask, and the
        scale of quantised ones; the parameter stays the same object."""
        self._part()
        self.weight.data = values
        if self.weight_scale is not None and scale is not None:
            self.weight_scale.data = scale

    def _part(self) -> None:
        super()._part()
        self.drop_library_form()

    @property
    def extra_bytes(self) -> int:
        """Bytes of the form of the weight that is kept beside the packed one, without the values that it shares."""
        form = self._library_form
        return 0 if form is None else form.nbytes - self.packed().has_library * self.weight.nbytes

    def to_dense_weight(self) -> torch.Tensor:
        """The weight [out, in] with its zeros."""
        self._check_whole()
        values, bits, in_features, pattern, _, scale, group_size = self.packed()
        return kernels.decompress(values, bits, in_features, pattern, scale, group_size)

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """A dense module of the class that this one stands for, with the zeros written out; what was quantised may be
        trained then."""
        conv1d = issubclass(self.dense_type, Conv1D)
        with torch.device("meta"):
            if conv1d:
                dense: nn.Module = Conv1D(self.out_features, self.in_features)
            else:
                dense = self.dense_type(self.in_features, self.out_features, bias=self.bias is not None)
        weight = self.to_dense_weight()
        trains = self.weight.requires_grad or self.values is not None
        dense.weight = nn.Parameter(weight.T.contiguous() if conv1d else weight, requires_grad=trains)
        dense.bias = self.bias
        return dense.train(self.training)

    def _prepare(self) -> None:
        kernels.prepare(self.packed())

    def _check_bits(self, bits: torch.Tensor, name: str) -> None:
        bits, pattern, count = local(bits), self.pattern, self.num_values
        if pattern.m is not None and pattern.n is not None:  # of the rows and columns that are here
            count = bits.shape[0] * self._columns(bits) // pattern.m * pattern.n
        check_bits(bits, pattern, self._columns(bits), count, name)

    def _packed_state(self, state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
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
        values = weight[mask].view(self._values_shape(()))
        if self.weight_scale is not None:
            integers = to_integers(weight, self.weight_scale, self.group_size, str(self.values))[mask]
            values = pack_integers(integers.view(values.shape), str(self.values))
            if not torch.equal(self._with(values, self.weight_mask, self.weight_scale).dense(), weight):
                raise ValueError(f"{prefix}weight is dense, and not integers times this layer's scales")
        packed = {"weight": values, "weight_mask": self.weight_mask, "weight_scale": self.weight_scale}
        return {**state_dict, **{f"{prefix}{name}": tensor for name, tensor in packed.items() if tensor is not None}}
