"""What modules with a packed weight have in common."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.distributed.utils import is_dtensor

from .. import kernels
from ..packing import values_shape
from ..pattern import Pattern


class PackedModule(nn.Module):
    """Base class of modules whose `weight` is the kept values of a sparse weight, and `weight_mask` where they are.

    Attributes:
        kernel: how to compute: "auto" (what was measured to be fastest, or a rule of thumb), or one of `KERNELS`.
    """

    weight: torch.Tensor
    weight_mask: torch.Tensor
    pattern: Pattern
    in_features: int
    out_features: int
    kernel: str = "auto"
    # The dense weight, which the forward pass uses as it is; set by `densified` for a while.
    _dense_weight: torch.Tensor | None = None
    # The packed weight for native code, kept from one forward pass to the next.
    _native: kernels.NativeWeight | None = None
    # What is not copied or pickled.
    _run_time: tuple[str, ...] = ("_dense_weight", "_native")

    def _make_tensors(self, stack: tuple[int, ...], num_values: int | None, **options: Any) -> None:
        """Makes `weight` and `weight_mask`, uninitialised, for a stack of matrices of that shape."""
        if num_values is None:
            if self.pattern.m is None or self.pattern.n is None:
                raise ValueError(f"num_values must be given for pattern {self.pattern}, which does not fix it")
            num_values = math.prod(stack) * (self.out_features * self.in_features // self.pattern.m * self.pattern.n)
        if not isinstance(num_values, int) or num_values % math.prod(stack):
            raise ValueError(f"num_values is {num_values!r}, which {math.prod(stack)} matrices cannot share equally")
        shape = values_shape(self.pattern, self.out_features, self.in_features, num_values // math.prod(stack))
        self.weight = nn.Parameter(torch.empty(*stack, *shape, **options))
        bits = torch.empty(*stack, self.out_features, -(-self.in_features // 8), **{**options, "dtype": torch.uint8})
        self.register_buffer("weight_mask", bits)

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
        """Of the dense weight."""
        return torch.Size((*self.weight_mask.shape[:-1], self.in_features))

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return self.weight.numel() / self.shape.numel()

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weight, were it dense in its dtype."""
        return self.shape.numel() * self.weight.element_size()

    @property
    def packed_bytes(self) -> int:
        """Bytes of values and mask."""
        return self.weight.nbytes + self.weight_mask.nbytes

    def check_mask(self, name: str) -> None:
        """Raises ValueError, naming the module `name`, where the mask does not fit the values or the pattern."""
        self._check_bits(self.weight_mask, f"{name}.weight_mask")
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
        self._part()
        super()._apply(*args, **kwargs)
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
        except ValueError as error:
            rest[-1].append(str(error))
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.pattern}, density={self.density:.4f}"


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that may be spread over several, by tensor parallelism or FSDP."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def onloaded(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer of the module itself; one that accelerate has offloaded from where it is kept."""
    tensor: torch.Tensor = getattr(module, name)
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]) if tensor.is_meta else ():
        if getattr(one, "weights_map", None) is not None:
            tensor = one.weights_map[name]
    return tensor


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
        and not kernels.gains_natively(module.weight, dtype or module.weight.dtype)
    ]
    try:
        for module in modules:
            module._dense_weight = module.to_dense_weight().to(dtype)
        yield
    finally:
        for module in modules:
            module._dense_weight = None
