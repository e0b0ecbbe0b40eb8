"""Calls the library of `source/`: y = x·Wᵀ + b and its gradients from the packed weight, on torch's own threads.

By ctypes, with the address of torch's `parallel_for`: no header of torch is needed to compile, and one library serves
every Python and every torch from 2.11 on. A call takes 2 microseconds more than `F.linear`.
Of quantised values, sums of x times integers overflow from 2e31 on where a float32 would hold 3e38 (integers are read
as floats 2^24 times as large): activations are far from both.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.utils import logging

from ...quantization import GROUP_STEP, groups_of_row
from ..products import linear_by_rows, mm, product_dtype
from .loading import UNIT_VARIABLE, choose_unit, load_library

logger = logging.get_logger(__name__)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INTEGERS = {torch.int8: 3, torch.uint8: 4}  # the latter two integers of 4 bits
# On a CPU with fast products in 16 bit, from so many tokens on torch's take less time, with panels of dense rows of so
# many bytes; and where bfloat16 is multiplied in tiles.
_PANELS, _PANELS_BESIDE_TILES = (96, 4 << 20), (512, 8 << 20)
_GRADIENT_BYTES = 8 << 20  # of a panel of the gradient of dense rows

# Units on which products with dense weights were measured to take less time than torch's.
_DENSE_UNITS = ("avx512amx", "avx512bf16", "avx512", "avx2")

_WRONG_MASK = 2  # of `enum failure`

_pointer, _int32, _int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Weight(ctypes.Structure):
    """`struct weight` of ksparse.h."""

    _fields_ = (
        ("values", _pointer),
        ("bits", _pointer),
        ("starts", _pointer),
        ("num_values", _int64),
        ("per_row", _int64),
        ("out_features", _int64),
        ("in_features", _int64),
        ("row_bytes", _int64),
        ("dtype", _int32),
        ("x_dtype", _int32),
        ("scales", _pointer),
        ("groups", _int64),
        ("group_size", _int64),
    )


class _Library(NamedTuple):
    """The loaded library, torch's `parallel_for`, and the number and the name of the unit that this CPU runs best."""

    functions: ctypes.CDLL
    parallel_for: int
    unit: int
    name: str


_SIGNATURES: dict[str, tuple[type, ...]] = {
    "ksparse_linear": (_pointer, _int32, _pointer, _pointer, _int64, _pointer, _pointer),
    "ksparse_grad_input": (_pointer, _int32, _pointer, _pointer, _int64, _pointer),
    "ksparse_gather": (_pointer, _int32, _pointer, _int64, _int64, _pointer, _pointer),
    "ksparse_row_starts": (_pointer, _int64, _int64, _pointer),
    "ksparse_expand": (_pointer, _int32, _pointer, _int64, _int64, _pointer),
}


def why_not_native() -> str | None:
    """Why packed weights are not computed natively on this machine's CPU; None where they are."""
    library = _library()
    return library if isinstance(library, str) else None


def multiplies_in(dtype: torch.dtype) -> bool:
    """Whether this CPU has fast products in a dtype of 16 bit: then with many tokens torch's take less time than those
    of the library, which are in float32."""
    return dtype is not torch.float32 and product_dtype(dtype, torch.device("cpu")) is dtype


def unit_name() -> str:
    """The instruction set that the library runs on, such as "avx2"."""
    return _loaded().name


def most_dense_tokens(dtype: torch.dtype) -> int:
    """Up to how many tokens a product with a dense weight takes less time here than in torch; 0 where it does not, or
    where that was not measured (`examples/benchmarks/cpu_speed.py`)."""
    if dtype not in DTYPES or why_not_native() is not None or unit_name() not in _DENSE_UNITS:
        return 0
    return 4 if multiplies_in(dtype) else 16


@functools.cache
def whole_mask(out_features: int, in_features: int) -> torch.Tensor:
    """The mask of a dense weight: one row of bits for all, [out, ceil(in / 8)] uint8 with a stride of 0."""
    bits = torch.full((-(-in_features // 8),), 255, dtype=torch.uint8, device="cpu")
    bits[in_features // 8 :] = (1 << in_features % 8) - 1
    return bits.expand(out_features, -1)


class NativeWeight:
    """A packed weight (table in `packing`) as the library takes it. It holds addresses, not tensors: good as long as
    the tensors are there, and `is_of` says that they are the same.

    Args:
        values, bits: contiguous, on the CPU; of a dense weight [out, in] its `whole_mask`. in_features: of the weight.
        scale, group_size: of values that are integers (table in `quantization`); contiguous, on the CPU. The layer's
            dtype is that of the scale.
    """

    def __init__(
        self,
        values: torch.Tensor,
        bits: torch.Tensor,
        in_features: int,
        scale: torch.Tensor | None = None,
        group_size: int = 0,
    ) -> None:
        library = _loaded()
        self.out_features, row_bytes = bits.shape
        if row_bytes != -(-in_features // 8) or bits.dtype is not torch.uint8 or not bits.is_cpu or not values.is_cpu:
            raise ValueError(
                f"bits are {bits.dtype} {list(bits.shape)} on {bits.device}, not of {in_features} columns"
            )
        self.in_features, self.dtype = in_features, values.dtype if scale is None else scale.dtype
        is_shared = bits.stride() == (0, 1)  # by all rows
        if not (values.is_contiguous() and (is_shared or bits.is_contiguous())):
            raise ValueError("native code takes contiguous values and bits: pass those of PackedWeight.contiguous()")
        if scale is not None:
            _check_scale(scale, values, (self.out_features, in_features), group_size)
        halves = 2 if values.dtype is torch.uint8 else 1
        # A row of n:m has as many values as every other one.
        self._starts = None if values.ndim == 2 else _row_starts(bits)
        per_row = halves * values.shape[1] if values.ndim == 2 else 0
        self._struct = _Weight(
            values.data_ptr(),
            bits.data_ptr(),
            None if self._starts is None else self._starts.data_ptr(),
            halves * values.numel(),
            per_row,
            self.out_features,
            in_features,
            0 if is_shared else row_bytes,
            DTYPES[values.dtype] if scale is None else _INTEGERS[values.dtype],
            DTYPES[self.dtype],
            None if scale is None else scale.data_ptr(),
            0 if scale is None else scale.shape[1],
            -(-min(group_size, in_features) // GROUP_STEP) * GROUP_STEP,
        )
        self._identity = _identity(values, bits, scale)
        tiled = library.name == "avx512amx" and self.dtype is torch.bfloat16
        self._panels = (_PANELS_BESIDE_TILES if tiled else _PANELS) if multiplies_in(self.dtype) else (math.inf, 0)
        self.address = ctypes.addressof(self._struct)
        self._linear = functools.partial(
            library.functions.ksparse_linear, library.parallel_for, library.unit, self.address
        )

    def is_of(self, values: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor | None = None) -> bool:
        """Whether these are still the tensors that it was made of; all may have been written to."""
        return _identity(values, bits, scale) == self._identity

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """y [..., out] = x [..., in]·Wᵀ + b; all of the weight's dtype.

        Raises:
            RuntimeError: x has another width or dtype, as in `F.linear`.
            MemoryError: there is no memory for x as floats.
            ValueError: the mask keeps another number of weights than there are values.
        """
        *batch, width = x.shape
        if width != self.in_features or x.dtype is not self.dtype:
            raise RuntimeError(
                f"x is {x.dtype} {list(x.shape)}, this layer takes {self.dtype} [..., {self.in_features}]"
            )
        if not x.is_contiguous():
            x = x.contiguous()
        if bias is not None:
            bias = self._checked(bias)
        tokens, panel_bytes = self._panels
        if width and x.numel() >= tokens * width:
            height = min(self.out_features, max(1, panel_bytes // (width * self.dtype.itemsize)))
            panel = torch.empty(height, width, dtype=self.dtype, device="cpu")

            def dense(rows: slice) -> torch.Tensor:
                return self._expand(rows, panel[: rows.stop - rows.start])

            return linear_by_rows(x.view(-1, width), dense, bias, self.out_features, height).view(*batch, -1)
        y = x.new_empty((*batch, self.out_features))
        pointer = None if bias is None else bias.data_ptr()
        self._do(self._linear, x.data_ptr(), math.prod(batch), pointer, y.data_ptr())
        return y

    def _checked(self, bias: torch.Tensor) -> torch.Tensor:
        if bias.dtype is not self.dtype or not bias.is_cpu or bias.shape != (self.out_features,):
            raise RuntimeError(
                f"bias is {bias.dtype} {list(bias.shape)} on {bias.device}, "
                f"this layer takes {self.dtype} [{self.out_features}] on the CPU"
            )
        return bias.contiguous()

    def grad_input(self, grad: torch.Tensor) -> torch.Tensor:
        """grad [..., out]·W: [..., in], of the weight's dtype."""
        grad = grad.contiguous()
        grad_x = grad.new_empty((*grad.shape[:-1], self.in_features))
        tokens = grad.shape[:-1].numel()
        self._call("ksparse_grad_input", grad.data_ptr(), tokens, grad_x.data_ptr())
        return grad_x

    def grad_values(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """gradᵀ·x at the mask, [number of values]; all of the weight's dtype, grad [..., out], x [..., in]. By torch's
        product, a panel of rows at a time: sums of kept weights alone were measured to take longer."""
        grad, x = grad.reshape(-1, self.out_features), x.reshape(-1, self.in_features)
        values = x.new_empty(self._struct.num_values)
        height = max(1, _GRADIENT_BYTES // max(1, self.in_features * self.dtype.itemsize))
        for start in range(0, self.out_features, height):
            rows = slice(start, min(start + height, self.out_features))
            panel = mm(grad[:, rows].T, x)
            self._call("ksparse_gather", rows.start, rows.stop, panel.data_ptr(), values.data_ptr())
        return values

    def dense(self) -> torch.Tensor:
        """The dense weight [out, in] in its dtype."""
        weight = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="cpu")
        return self._expand(slice(0, self.out_features), weight)

    def _expand(self, rows: slice, to: torch.Tensor) -> torch.Tensor:
        self._call("ksparse_expand", rows.start, rows.stop, to.data_ptr())
        return to

    def _call(self, name: str, *arguments: int) -> None:
        functions, parallel_for, unit, _ = _loaded()
        self._do(functools.partial(getattr(functions, name), parallel_for, unit, self.address), *arguments)

    def _do(self, function: Callable[..., int], *arguments: int | None) -> None:
        error = function(*arguments)
        if error == _WRONG_MASK and self._starts is not None:  # something was written into the mask
            _count(self._struct, self._starts)
            error = function(*arguments)
        if error == _WRONG_MASK:
            raise ValueError(
                f"weight_mask of a layer [{self.out_features}, {self.in_features}] does not keep as many weights as "
                f"there are values, {self._struct.num_values}: mask and values must be replaced together"
            )
        if error:
            raise MemoryError("out of memory in a product of a sparse layer on the CPU: give fewer tokens at a time")


def _identity(values: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor | None) -> tuple[object, ...]:
    of_scale = None if scale is None else (scale.data_ptr(), scale.shape, scale.dtype)
    return values.data_ptr(), bits.data_ptr(), values.numel(), bits.shape[0], values.dtype, of_scale


def _check_scale(scale: torch.Tensor, values: torch.Tensor, shape: tuple[int, int], group_size: int) -> None:
    out_features, in_features = shape
    if values.dtype not in _INTEGERS or scale.dtype not in DTYPES or not scale.is_cpu or not scale.is_contiguous():
        raise ValueError(
            f"values are {values.dtype}, the scale is {scale.dtype} on {scale.device}: native code takes int8 and "
            f"uint8 with a contiguous scale in {', '.join(map(str, DTYPES))} on the CPU"
        )
    groups = groups_of_row(group_size, in_features) if group_size > 0 else 0
    if scale.shape != (out_features, groups) or (group_size % GROUP_STEP and groups > 1):
        raise ValueError(
            f"scale is {list(scale.shape)} with group_size={group_size}, allowed for a weight {list(shape)}: "
            f"[{out_features}, ceil({in_features} / group_size)], and group_size a multiple of {GROUP_STEP} or at "
            f"least {in_features}"
        )


# Where the values of a mask's rows begin, by where the mask lies, and a reference to its storage: though weak, it
# keeps another one from having its address.
_starts: dict[tuple[object, ...], tuple[StorageWeakRef, torch.Tensor]] = {}


def _row_starts(bits: torch.Tensor) -> torch.Tensor:
    """Where each row's values begin, [out] int64. Counted once for a mask: the library tells if that is outdated."""
    storage = bits.untyped_storage()
    key = storage._cdata, bits.storage_offset(), bits.shape
    reference, starts = _starts.get(key, (None, None))
    if reference is not None and starts is not None and not reference.expired():
        return starts
    starts = torch.empty(bits.shape[0], dtype=torch.int64, device="cpu")  # not the default device
    _count(_Weight(bits=bits.data_ptr(), out_features=bits.shape[0], row_bytes=bits.shape[1]), starts)
    if len(_starts).bit_count() == 1:  # a power of two: each time that there are twice as many
        for other in [other for other, (reference, _) in list(_starts.items()) if reference.expired()]:
            _starts.pop(other, None)
    _starts[key] = StorageWeakRef(storage), starts
    return starts


def _count(weight: _Weight, starts: torch.Tensor) -> None:
    _loaded().functions.ksparse_row_starts(weight.bits, weight.out_features, weight.row_bytes, starts.data_ptr())


def _loaded() -> _Library:
    library = _library()
    assert not isinstance(library, str), library
    return library


@functools.cache
def _library() -> _Library | str:
    """The library, or why there is none, which is warned of once.

    Raises:
        ValueError: the environment variable `KSPARSE_CPU` names a unit that cannot run.
        RuntimeError: it names one, and there is no library.
    """
    if os.environ.get("KSPARSE_NATIVE") == "0":
        return "KSPARSE_NATIVE=0 turns native code off"
    try:
        return _load()
    except (OSError, AttributeError) as error:  # the latter of a torch that cannot be called
        reason = str(error)
    if forced := os.environ.get(UNIT_VARIABLE):
        raise RuntimeError(f"{UNIT_VARIABLE}={forced!r} cannot be used: {reason}")
    logger.warning(f"Sparse layers run without native code on this CPU, which is slow: {reason}")
    return reason


def _load() -> _Library:
    functions = load_library()
    for name, arguments in _SIGNATURES.items():
        getattr(functions, name).argtypes = arguments
    suffix = "dylib" if sys.platform == "darwin" else "so"
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))
    parallel_for = ctypes.cast(torch_cpu.torch_parallel_for, _pointer).value
    assert parallel_for is not None
    return _Library(functions, parallel_for, *choose_unit(functions))
