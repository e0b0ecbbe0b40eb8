"""`RuntimeConfig`: how a loaded sparse model computes."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import check_boolean, check_integer, check_one_of
from ..kernels import KERNELS

OBJECTIVES = ("memory", "speed")
CHOICES = {"kernel": ("auto", *KERNELS), "optimize_for": OBJECTIVES, "densify": ("never", "lazy")}


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How a loaded sparse model computes: given at each load, `from_pretrained(..., runtime_config=RuntimeConfig())`,
    or to `configure(model, RuntimeConfig())`, and never saved.

    Args:
        kernel: what computes the sparse layers: `"auto"` (by a rule of thumb, or what `autotune_kernels` measured to
            be fastest), or one by name (see `optimum-cli ksparse bench`); the environment variable `KSPARSE_KERNEL`
            wins over it.
        densify: `"lazy"` keeps every layer dense in memory from its first forward pass on, which is the right choice
            where there are no kernels (CPUs, older GPUs) and memory is no concern; `"never"` does not.
        optimize_for: `"memory"` keeps at most 0.65 of a layer's dense bytes on the GPU; `"speed"` (experimental) may
            keep a second form of a layer (dense, or the sparse library's) where it was measured to be faster.
        max_extra_bytes: the most that `"speed"` may add to the whole model; None sets no limit.
        fuse: (experimental) run layers of a block that read the same input (q, k, v; gate, up) as one product, where
            that gives the same bits.

    Raises:
        TypeError, ValueError: names the argument, what was found and what is allowed.
    """

    kernel: str = "auto"
    densify: str = "never"
    optimize_for: str = "memory"
    max_extra_bytes: int | None = None
    fuse: bool = False

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            check_one_of(name, getattr(self, name), allowed)
        if self.max_extra_bytes is not None:
            check_integer("max_extra_bytes", self.max_extra_bytes, 0)
        check_boolean("fuse", self.fuse)
