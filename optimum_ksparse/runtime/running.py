"""How a loaded sparse model computes: which kernels, and which form of the weights beside the packed one. Nothing here
changes what the model is or what is saved."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from ..checkpoint import sparse_layers, sparse_modules
from ..kernels import BUCKETS
from .config import RuntimeConfig
from .tuning import KernelReport, autotune


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


def autotune_kernels(model: PreTrainedModel, tokens: Sequence[int] = BUCKETS) -> KernelReport:
    """Measures the kernels for each shape of sparse layer of `model`, where it stands now, and gives layers torch's
    semi-structured form where that pays and shares the values: they take at most 0.65 of their dense bytes. What is
    measured is kept on disk, so that this takes seconds the next time. Without it a rule of thumb chooses the kernels,
    and layers stay packed alone.

    After `model.to("cuda")` call it. The report is `model.kernel_report` too.

    Args:
        tokens: for which numbers of tokens in a forward pass; each stands for those down to the half of it.

    Raises:
        ValueError: the model has no sparse layers, or `tokens` are others than those that are measured.
    """
    layers = sparse_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no sparse layers; prune it, or load a sparse checkpoint")
    if not tokens or not set(tokens) <= set(BUCKETS):
        raise ValueError(f"tokens={list(tokens)!r} must be some of {', '.join(map(str, BUCKETS))}")
    report = autotune(layers, tuple(tokens))
    model.kernel_report = report  # type: ignore[assignment]
    return report
