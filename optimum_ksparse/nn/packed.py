"""What modules with a packed weight have in common."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.distributed.utils import is_dtensor

from .. import kernels
from ..packing import unpack_mask, values_shape
from ..pattern import Pattern
from ..quantization import (
    TYPES,
    check_cast,
    check_group_size,
    check_quantised,
    columns_of_group,
    empty_quantised,
    groups_of_row,
)
from .placement import local, onloaded


class PackedModule(nn.Module):
    """Base class of modules whose `weight` is the kept values of a sparse weight, and `weight_mask` where they are.
    Quantised values (table in `quantization`) have a `weight_scale`, and are not trained: `dequantize_values` makes
    ordinary ones of them.

    Attributes:
        num_values: how many weights are kept.
        values: type of quantised values, "int8" or "int4"; None of others.
        group_size: how many columns of a row share a scale; 0 without scales.
        kernel: how to compute: "auto" (what was measured to be fastest, or a rule of thumb), or one of `KERNELS`.
    """

    weight: torch.Tensor
    weight_mask: torch.Tensor
    weight_scale: torch.Tensor | None
    pattern: Pattern
    in_features: int
    out_features: int
    num_values: int
    values: str | None
    group_size: int
    kernel: str = "auto"
    # The dense weight, which the forward pass uses as it is; set by `densified` for a while.
    _dense_weight: torch.Tensor | None = None
    # The packed weight for native code, kept from one forward pass to the next.
    _native: kernels.NativeWeight | None = None
    # What is not copied or pickled.
    _run_time: tuple[str, ...] = ("_dense_weight", "_native")

    def _make_tensors(
        self, stack: tuple[int, ...], num_values: int | None, values: str | None, group_size: int, **options: Any
    ) -> None:
        """Makes `weight`, `weight_mask` and, with a type of quantised `values`, `weight_scale`, uninitialised, for a
        stack of matrices of that shape."""
        if num_values is None:
            if self.pattern.m is None or self.pattern.n is None:
                raise ValueError(f"num_values must be given for pattern {self.pattern}, which does not fix it")
            num_values = math.prod(stack) * (self.out_features * self.in_features // self.pattern.m * self.pattern.n)
        if not isinstance(num_values, int) or num_values % math.prod(stack):
            raise ValueError(f"num_values is {num_values!r}, which {math.prod(stack)} matrices cannot share equally")
        self.num_values, self.values, self.group_size = num_values, values, 0
        shape = (*stack, *self._values_shape(stack))
        scale = None
        if values is None:
            self.weight = nn.Parameter(torch.empty(shape, **options))
        else:
            self.group_size = columns_of_group(check_group_size("group_size", group_size), self.in_features)
            scales = (*stack, self.out_features, groups_of_row(group_size, self.in_features))
            integers, scale = empty_quantised(values, shape, scales, **options)
            self.weight = nn.Parameter(integers, requires_grad=False)
        self.register_buffer("weight_scale", scale)
        bits = torch.empty(*stack, self.out_features, -(-self.in_features // 8), **{**options, "dtype": torch.uint8})
        self.register_buffer("weight_mask", bits)

    def _values_shape(self, stack: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the kept values of one matrix of a stack, were they not quantised."""
        return values_shape(self.pattern, self.out_features, self.in_features, self.num_values // math.prod(stack))

    def to_dense_weight(self) -> torch.Tensor:
        """The weight with its zeros."""
        raise NotImplementedError

    def _check_bits(self, bits: torch.Tensor, name: str) -> None:
        """Raises ValueError, naming the tensor `name`, where a mask does not fit the values or the pattern."""
        raise NotImplementedError

    def _check_whole(self) -> None:
        """Raises ValueError where this process holds a part of the weight."""
        if is_dtensor(self.weight):
            raise ValueError(
                "the weights are spread over processes (tensor parallelism or FSDP), and none has all of them to "
                "write them out dense: save the model packed, and load it in one process"
            )

    def _prepare(self) -> None:
        """Makes what the kernels keep in memory, where the weight now is."""
        raise NotImplementedError

    def _part(self) -> None:
        """Forgets what was made of the weight as it is, and what shares memory with it."""
        self._dense_weight = self._native = None

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense weight."""
        return torch.Size((*self.weight_mask.shape[:-1], self.in_features))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of inputs and outputs."""
        return self.weight.dtype if self.weight_scale is None else self.weight_scale.dtype

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return self.num_values / self.shape.numel()

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weight, were it dense in its dtype."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def packed_bytes(self) -> int:
        """Bytes of values, mask and scales."""
        of_scales = 0 if self.weight_scale is None else self.weight_scale.nbytes
        return self.weight.nbytes + self.weight_mask.nbytes + of_scales

    def check_mask(self, name: str) -> None:
        """Raises ValueError, naming the module `name`, where the mask does not fit the values or the pattern, or
        integers or scales cannot be right."""
        self._check_bits(self.weight_mask, f"{name}.weight_mask")
        if self.weight_scale is not None:
            values, scale = (local(onloaded(self, tensor)) for tensor in ("weight", "weight_scale"))
            if not (values.is_meta or scale.is_meta):
                check_quantised(values, scale, name)
        self._prepare()

    @torch.no_grad()
    def dequantize_values(self) -> None:
        """Makes ordinary kept values of quantised ones, on the same mask, in the dtype of the scale, which training
        may change; the weight stays the same one. Without quantised values it does nothing."""
        if self.values is None:
            return
        stack = self.weight_mask.shape[:-2]
        kept = self.to_dense_weight()[unpack_mask(self.weight_mask, self.in_features)]
        self._part()
        self.weight = nn.Parameter(kept.view(*stack, *self._values_shape(stack)))
        self.values, self.group_size, self.weight_scale = None, 0, None
        self._prepare()

    @torch.no_grad()
    def take_integers(self, packed: torch.Tensor, scale: torch.Tensor, group_size: int) -> None:
        """Takes packed integers and their scales in the place of ordinary kept values, on the same mask."""
        self._part()
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.values, self.group_size, self.weight_scale = TYPES[packed.dtype], group_size, scale
        self._prepare()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in `nn.Module`, which also comes here for `module.weight = nn.Parameter(...)`.

        Raises:
            TypeError: torch.nn.utils.prune would put its own mask in the place of `weight_mask`; or the values are a
                quantized tensor of another library, which this module's kernels cannot read; or the weight is taken
                away, as by quanto, whose module has it by then and would read it as a dense one.
        """
        library = type(param).__module__.partition(".")[0]
        what = None
        if name == "weight_orig":
            what = "torch.nn.utils.prune or spectral_norm"
        elif name == "weight" and param is None and self._parameters.get(name) is not None:
            what = "what takes its weight away and computes with it (optimum-quanto)"
        elif name == "weight" and param is not None and library != "torch":
            what = f"{type(param).__name__} of {library}"
        if what is not None:
            raise TypeError(
                f"{type(self).__name__} keeps its weight packed, the kept values and a bitmask of where they are: "
                f"{what} cannot work on it. Call model.dequantize() first, which gives dense modules with the zeros "
                "written out, or leave these modules out"
            )
        super().register_parameter(name, param)

    def _apply(self, *args: Any, **kwargs: Any) -> PackedModule:
        before = self.weight_scale
        self._part()
        super()._apply(*args, **kwargs)
        if before is not None and not before.is_meta and before.dtype != self.dtype:
            check_cast(local(before), self.dtype, str(self.values), str(self))  # torch tells no module its name
        self._prepare()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self._run_time}

    def _packed_state(self, state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        """The state dict to load, whatever form it came in; raises ValueError where it cannot be this module's."""
        return state_dict

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *rest: Any
    ) -> None:
        self._part()
        try:
            state_dict = self._packed_state(state_dict, prefix)
            bits = state_dict.get(f"{prefix}weight_mask")
            if bits is not None and bits.shape == self.weight_mask.shape and bits.device.type != "meta":
                self._check_bits(bits, f"{prefix}weight_mask")
            self._check_values(state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}weight_scale"), prefix)
        except ValueError as error:
            rest[-1].append(str(error))
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)

    def _check_values(self, values: torch.Tensor | None, scale: torch.Tensor | None, prefix: str) -> None:
        """Raises ValueError where the values of a state dict are of another type, or cannot be right."""
        found = None if values is None or values.is_floating_point() else TYPES.get(values.dtype, str(values.dtype))
        if values is not None and found != self.values:
            raise ValueError(
                f"{prefix}weight holds {found or 'values that are not quantised'}, this layer "
                f"{self.values or 'values that are not quantised'}"
            )
        if values is not None and scale is not None and not (values.is_meta or scale.is_meta):
            check_quantised(local(values), local(scale), prefix.removesuffix("."))

    def extra_repr(self) -> str:
        values = "" if self.values is None else f", values={self.values}, group_size={self.group_size}"
        return f"{super().extra_repr()}, pattern={self.pattern}, density={self.density:.4f}{values}"


def check_trainable(root: nn.Module) -> None:
    """Raises ValueError, which names the first of them, where modules under `root` have quantised values."""
    for name, module in root.named_modules():
        if isinstance(module, PackedModule) and module.values is not None:
            raise ValueError(
                f"{name or type(module).__name__} has {module.values} values, which cannot be trained: call "
                "dequantize_values() on the model before, which makes ordinary values of them on the same masks, or "
                "train an adapter (LoRA)"
            )


def requires_grad_(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `nn.Module.requires_grad_`: modules with quantised values are refused by name, with what to do."""

    @functools.wraps(original)
    def requires_grad_(self: nn.Module, requires_grad: bool = True) -> Any:
        if requires_grad:
            check_trainable(self)
        return original(self, requires_grad)

    return requires_grad_


@contextmanager
def densified(root: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Within it, sparse modules under `root` keep their weights dense instead of decompressing them in each forward
    pass; for many passes without gradients of the weights, under autocast to `dtype`, where one is given. Modules that
    accelerate has offloaded or that are spread over processes are left as they are, and so are those that native code
    computes in less time."""
    modules = [
        module
        for module in root.modules()
        if isinstance(module, PackedModule)
        and not (module.weight.is_meta or is_dtensor(module.weight))
        and module._dense_weight is None
        and not kernels.gains_natively(module.weight, dtype or module.dtype, module.weight_scale)
    ]
    try:
        for module in modules:
            module._dense_weight = module.to_dense_weight().to(dtype)
        yield
    finally:
        for module in modules:
            module._dense_weight = None
