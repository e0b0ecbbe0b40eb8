"""The ways to compute y = x·Wᵀ + b with a packed W: the table of kernels, what each can take, and its configurations.

| kernel | tokens | what it does |
|---|---|---|
| gemv | 1 to 4 | reads packed weights once, on ordinary cores |
| dot | any | decompresses tiles in registers, multiplies on tensor cores |
| decompress | any | decompresses rows of W to scratch memory, multiplies with cuBLAS |
| library | any | torch's semi-structured tensor, where a layer keeps that form |
| native | any | on a CPU, native code that reads packed weights and multiplies the kept ones |
| reference | any | decompresses in plain PyTorch: every pattern, dtype and device |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..packing import unpack, unpack_mask
from ..pattern import Pattern
from ..quantization import BITS, GROUP_SIZES, TYPES, dequantize, groups_of_row
from . import hardware
from .cpu import DTYPES, NativeWeight, why_not_native
from .hardware import on_device_of
from .library import library_linear
from .products import linear, linear_by_rows

GROUPS = {"2:4": 4, "4:8": 8}  # m of the patterns that kernels take
# Scratch of `decompress`: a chunk of W that stays in the L2 cache of large GPUs, and the most that is ever taken.
_CHUNK_BYTES = (32 << 20, 256 << 20)

Config = dict[str, Any]


class PackedWeight(NamedTuple):
    """A packed weight (tables in `packing`, and with a `scale` in `quantization`), and torch's semi-structured form of
    it, where a layer keeps that: the `values` then are a view of it, and it counts for nothing where they are not."""

    values: torch.Tensor
    bits: torch.Tensor
    in_features: int
    pattern: str
    library: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    group_size: int = 0

    @property
    def out_features(self) -> int:
        return self.bits.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the products."""
        return self.values.dtype if self.scale is None else self.scale.dtype

    @property
    def value_type(self) -> str | None:
        """The type of quantised values, such as "int8"; None of others."""
        return None if self.scale is None else TYPES[self.values.dtype]

    @property
    def num_values(self) -> int:
        """How many weights are kept."""
        halves = self.scale is not None and self.values.dtype is torch.uint8
        return int(unpack_mask(self.bits, self.in_features).sum()) if halves else self.values.numel()

    def cast(self, dtype: torch.dtype) -> PackedWeight:
        """The weight for products in another dtype."""
        if self.scale is None:
            return self._replace(values=self.values.to(dtype))
        return self._replace(scale=self.scale.to(dtype))

    def to(self, device: torch.device) -> PackedWeight:
        """The weight on another device, without torch's form of it."""
        scale = None if self.scale is None else self.scale.to(device)
        return self._replace(values=self.values.to(device), bits=self.bits.to(device), scale=scale, library=None)

    def contiguous(self) -> PackedWeight:
        """The weight with contiguous tensors, as native code reads them."""
        scale = None if self.scale is None else self.scale.contiguous()
        return self._replace(values=self.values.contiguous(), bits=self.bits.contiguous(), scale=scale)

    def native(self) -> NativeWeight:
        """The weight for native code, good as long as the tensors of this one, which must be contiguous, are there."""
        return NativeWeight(self.values, self.bits, self.in_features, self.scale, self.group_size)

    def dense(self) -> torch.Tensor:
        """The weight [out, in], in plain PyTorch."""
        if self.scale is None:
            return unpack(self.values, self.bits, self.in_features)
        return dequantize(self.values, self.bits, self.in_features, self.scale, self.group_size)

    def problem(self, tokens: int) -> Problem:
        """What there is to compute for an input of so many tokens."""
        shape, device = (self.out_features, self.in_features), self.values.device
        return Problem(*shape, tokens, self.pattern, self.dtype, device, self.value_type)

    @property
    def has_library(self) -> bool:
        """Whether `library` holds these values."""
        return self.library is not None and self.library.data_ptr() == self.values.data_ptr()


@dataclass(frozen=True)
class Problem:
    """A product to compute: W [out, in] of a pattern and dtype on a device, with so many tokens; of quantised values,
    of which type they are."""

    out_features: int
    in_features: int
    tokens: int
    pattern: str
    dtype: torch.dtype
    device: torch.device
    value_type: str | None = None

    @property
    def dense_bytes(self) -> int:
        """Bytes of W, were it dense."""
        return self.out_features * self.in_features * self.dtype.itemsize

    @property
    def packed_bytes(self) -> int:
        """Bytes of W packed: kept values, a bit for each weight, and scales of the usual groups."""
        weights, value_bytes, groups = self.out_features * self.in_features, float(self.dtype.itemsize), 0
        if self.value_type is not None:
            value_bytes = BITS[self.value_type] / 8
            groups = groups_of_row(GROUP_SIZES[self.value_type], self.in_features)
        packed = weights * (Pattern(self.pattern).density * value_bytes + 1 / 8)
        return int(packed) + self.out_features * groups * self.dtype.itemsize

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        values = "" if self.value_type is None else f"{self.value_type} "
        return f"{self.pattern} {values}{dtype} {self.out_features}x{self.in_features} t{self.tokens}"


@dataclass(frozen=True)
class Kernel:
    """One way to compute a product.

    Attributes:
        run: (x [tokens, in], weight, bias, **config) → y [tokens, out].
        why_not: why it cannot take a problem; None where it can.
        configs: what to try, the first where nothing was measured.
    """

    run: Callable[..., torch.Tensor]
    why_not: Callable[[Problem], str | None] = lambda problem: None
    configs: Callable[[Problem], list[Config]] = lambda problem: [{}]


@dataclass(frozen=True)
class Candidate:
    """A kernel in one of its configurations."""

    kernel: str
    config: Config = field(default_factory=dict)

    def run(self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        run = KERNELS[self.kernel].run
        if not x.is_cuda:
            return run(x, weight, bias, **self.config)
        with on_device_of(x):
            return run(x, weight, bias, **self.config)

    def __str__(self) -> str:
        config = ", ".join(f"{name}={value}" for name, value in self.config.items())
        return f"{self.kernel}({config})" if config else self.kernel


def has_kernels(problem: Problem) -> bool:
    """Whether there is a choice for this problem: elsewhere `native` or `reference` computes it."""
    return hardware.runs_kernels(problem.device) and _why_not_packed(problem) is None


def _why_not_packed(problem: Problem) -> str | None:
    """What all Triton kernels need."""
    reason = hardware.why_no_kernels(problem.device)
    if reason is None and problem.pattern not in GROUPS:
        reason = f"there are kernels for {' and '.join(GROUPS)}, not for {problem.pattern}"
    elif reason is None and problem.dtype not in (torch.bfloat16, torch.float16):
        reason = f"the kernels take bfloat16 and float16, not {problem.dtype}"
    return reason


def _why_not_decompress(problem: Problem) -> str | None:
    return _why_not_packed(problem) or _why_not_quantised(problem)


def _why_not_quantised(problem: Problem) -> str | None:
    """What kernels without quantised values say of them."""
    values = problem.value_type
    return None if values is None else f"it takes values in the dtype of the products, not {values}"


def _why_not_gemv(problem: Problem) -> str | None:
    few = f"gemv takes at most 4 tokens, not {problem.tokens}" if problem.tokens > 4 else None
    return _why_not_packed(problem) or few


def _why_not_dot(problem: Problem) -> str | None:
    odd = f"dot needs in_features that 8 divides, not {problem.in_features}" if problem.in_features % 8 else None
    return _why_not_packed(problem) or odd


def _why_not_library(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return "torch's semi-structured tensors need a CUDA device"
    if problem.pattern != "2:4":
        return f"torch's semi-structured tensors are 2:4, not {problem.pattern}"
    if not torch.backends.cusparselt.is_available():
        return "this torch has no cuSPARSELt"
    if (reason := _why_not_quantised(problem)) is not None:
        return reason
    limits = torch.sparse.SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS.get(problem.dtype)
    if limits is None:
        return f"torch's semi-structured tensors do not take {problem.dtype}"
    if problem.out_features % limits.sparse_min_rows or problem.in_features % limits.sparse_min_cols:
        return (
            f"torch's semi-structured tensors need multiples of {limits.sparse_min_rows} x {limits.sparse_min_cols}, "
            f"the weight is {problem.out_features} x {problem.in_features}"
        )
    return None


def _gemv_configs(problem: Problem) -> list[Config]:
    """(warps, rows), none of which spills registers on any GPU that is compiled for."""
    if problem.tokens == 1:
        pairs = [(4, 2), (4, 1), (2, 4), (8, 2), (1, 4), (1, 8)]
    elif problem.tokens == 2:
        pairs = [(4, 1), (8, 1), (2, 4), (1, 2), (1, 4)]
    else:
        pairs = [(4, 2), (1, 2), (1, 1)]
    return [{"warps": warps, "rows": rows} for warps, rows in pairs]


# (rows, tokens, bytes, warps, stages, splits, permute) by the most tokens; the first fits the memory of every GPU.
_TILES: dict[int, list[tuple[Any, ...]]] = {
    16: [
        (32, 16, 32, 4, 4, 1, False),
        (64, 16, 32, 4, 4, 1, False),
        (64, 16, 32, 4, 4, 1, True),
        (32, 16, 32, 4, 4, 1, True),
        (64, 16, 32, 4, 4, 4, True),
    ],
    32: [
        (32, 32, 32, 4, 4, 1, True),
        (64, 32, 32, 4, 3, 1, True),
        (64, 32, 32, 4, 3, 1, False),
        (64, 32, 32, 4, 3, 4, True),
    ],
    64: [
        (64, 64, 16, 4, 3, 1, True),
        (64, 64, 16, 4, 4, 1, True),
        (128, 64, 16, 8, 3, 1, True),
        (64, 64, 16, 4, 4, 4, True),
    ],
}
_LARGE_TILES = [
    (128, 128, 16, 8, 2, 1, True),
    (128, 128, 16, 8, 3, 1, True),
    (64, 64, 16, 4, 4, 1, True),
    (128, 128, 16, 8, 3, 2, True),
]
# On others than Hopper their sums do not fit the registers, or the tiles the shared memory.
_HOPPER_TILES = [(64, 128, 16, 4, 3, 1, True), (128, 256, 16, 8, 2, 1, True), (128, 128, 32, 8, 2, 1, True)]
# Larger ones do not fit the tensor memory of Blackwell: up to Triton 3.8 a kernel is then nothing but a trap.
_BLACKWELL_TILES = [(64, 64, 16, 4, 3, 1, True), (128, 64, 16, 8, 3, 1, True), (64, 64, 16, 4, 4, 4, True)]


def _dot_configs(problem: Problem) -> list[Config]:
    generation = hardware.capability(problem.device)[0]
    tiles = next((tiles for tokens, tiles in _TILES.items() if problem.tokens <= tokens), None)
    if tiles is None and generation == 10:
        tiles = _BLACKWELL_TILES
    elif tiles is None:
        tiles = _LARGE_TILES + (_HOPPER_TILES if generation == 9 else [])
    names = ("rows", "tokens", "bytes", "warps", "stages", "splits", "permute")
    return [dict(zip(names, tile, strict=True)) for tile in tiles]


def _decompress_configs(problem: Problem) -> list[Config]:
    cached, most = _CHUNK_BYTES
    return [{"scratch": most}, *([{"scratch": cached}] if cached < problem.dense_bytes else [])]


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and beginning at a multiple of 16 bytes, as the kernels' loads need it."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _triton(name: str) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, **config: Any) -> torch.Tensor:
        kernel = getattr(import_module(f".triton.{name}", __package__), name)
        values, bits = aligned(weight.values), aligned(weight.bits)
        if weight.scale is not None:
            config |= {"scale": weight.scale.contiguous(), "group_size": weight.group_size}
        return kernel(aligned(x), values, bits, bias, GROUPS[weight.pattern], **config)

    return run


def _run_decompress(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, *, scratch: int) -> torch.Tensor:
    from .triton.dense import decompress

    rows = max(1, scratch // (weight.in_features * weight.values.element_size()))
    x, values, bits, group = aligned(x), aligned(weight.values), aligned(weight.bits), GROUPS[weight.pattern]
    if rows >= weight.out_features:
        return F.linear(x, decompress(values, bits, weight.in_features, group), bias)

    def dense(part: slice) -> torch.Tensor:
        return decompress(values[part], bits[part], weight.in_features, group)

    return linear_by_rows(x, dense, bias, weight.out_features, rows)


def _run_library(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    assert weight.library is not None
    return library_linear(aligned(x), weight.library, bias, weight.out_features)


def _why_not_native(problem: Problem) -> str | None:
    if problem.device.type != "cpu":
        return f"native code is for CPUs, not for {problem.device.type}"
    if problem.dtype not in DTYPES:
        return f"native code takes float32, bfloat16 and float16, not {problem.dtype}"
    return why_not_native()


def _run_native(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    weight = weight.contiguous()
    return weight.native().linear(x, bias)


def _run_reference(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    return linear(x, weight.dense(), bias)


KERNELS: dict[str, Kernel] = {
    "gemv": Kernel(_triton("gemv"), _why_not_gemv, _gemv_configs),
    "dot": Kernel(_triton("dot"), _why_not_dot, _dot_configs),
    "decompress": Kernel(_run_decompress, _why_not_decompress, _decompress_configs),
    "library": Kernel(_run_library, _why_not_library),
    "native": Kernel(_run_native, _why_not_native),
    "reference": Kernel(_run_reference),
}
