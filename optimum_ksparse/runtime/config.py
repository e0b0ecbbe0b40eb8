"""How a loaded sparse model computes, as its user says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..checkpoint import sparse_modules
from ..checks import check_one_of
from ..kernels import KERNELS


@dataclass(frozen=True, init=False)
class RuntimeConfig:
    """How a loaded sparse model computes: given at each load, `from_pretrained(..., runtime_config=RuntimeConfig())`,
    or to `configure(model, RuntimeConfig())`, and never saved.

    Args:
        kernel: what computes the sparse layers: `"auto"` (by a rule of thumb, or what `autotune_kernels` measured to
            be fastest), or one by name (see `optimum-cli ksparse bench`); the environment variable `KSPARSE_KERNEL`
            wins over it.

    Raises:
        TypeError, ValueError: names the argument, what was found and what is allowed.
    """

    kernel: str = "auto"

    def __init__(self, *, kernel: str = "auto", **unknown: Any) -> None:
        if unknown:
            raise TypeError(f"RuntimeConfig has no setting {next(iter(unknown))!r}; allowed: kernel")
        object.__setattr__(self, "kernel", check_one_of("kernel", kernel, ("auto", *KERNELS)))


def configure(model: PreTrainedModel, config: RuntimeConfig) -> None:
    """Makes a loaded sparse model compute as `config` says, however it did before.

    Raises:
        TypeError: `config` is none.
        ValueError: the model has no sparse layers.
    """
    if not isinstance(config, RuntimeConfig):
        raise TypeError(f"runtime_config must be a RuntimeConfig, found {type(config).__name__}")
    modules = sparse_modules(model).values()
    if not modules:
        raise ValueError(f"runtime_config says how sparse layers compute, and {type(model).__name__} has none")
    for module in modules:
        module.kernel = config.kernel
