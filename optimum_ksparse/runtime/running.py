"""How a loaded sparse model computes: which kernels, which forms of the weights beside the packed ones, which products
together. Nothing here changes what the model is or what is saved."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..blocks import decoder_of, evaluation_mode
from ..checkpoint import sparse_layers, sparse_modules
from ..kernels import BUCKETS
from .config import RuntimeConfig
from .fusing import fuse_shared_inputs, unfuse
from .tuning import KernelReport, autotune

logger = logging.get_logger(__name__)


def configure(model: PreTrainedModel, config: RuntimeConfig) -> None:
    """Makes a loaded sparse model compute as `config` says, however it did before.

    Raises:
        TypeError: `config` is none.
        ValueError: the model has no sparse layers.
    """
    if not isinstance(config, RuntimeConfig):
        raise TypeError(f"runtime_config must be a RuntimeConfig, found {type(config).__name__}")
    layers = sparse_modules(model)
    if not layers:
        raise ValueError(f"runtime_config says how sparse layers compute, and {type(model).__name__} has none")
    unfuse(model)
    for layer in layers.values():
        layer.drop_forms()
        layer.kernel, layer.densify = config.kernel, config.densify
    if config.fuse:
        fuse_model(model)
    if config.optimize_for == "speed" and sparse_layers(model):  # there may be stacks of experts alone, or nothing
        autotune_kernels(model, optimize_for="speed", max_extra_bytes=config.max_extra_bytes)


def tell_cost_on_cpu(model: PreTrainedModel) -> None:
    """Says once in a job what a sparse model costs on a CPU, where nothing is set against it."""
    is_worker = multiprocessing.parent_process() is not None or os.environ.get("RANK", "0") != "0"
    modules = sparse_modules(model).values()
    if not is_worker and any(module.densify == "never" and module.weight.device.type == "cpu" for module in modules):
        logger.warning_once(
            "Sparse layers are slower than dense ones on a CPU, with one token at a time several times, because each "
            "forward pass decompresses their weights. As fast as the dense model, in its memory: "
            'from_pretrained(..., runtime_config=RuntimeConfig(densify="lazy")).'
        )


def fuse_model(model: PreTrainedModel) -> list[list[str]]:
    """Runs sparse layers of `model` that read the same input (q, k and v; gate and up) as one product, wherever the
    bits of the outputs stay the same. Found out, and checked, by a forward pass of a few tokens.

    Returns:
        The names of the layers that run together; none where the weights are on the meta device.
    """
    embeddings = model.get_input_embeddings()
    weight = next(embeddings.parameters())
    device: torch.device | None = weight.device
    if weight.is_meta:  # accelerate brings them in for a forward pass
        device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
        if device is None:
            return []
    ids = torch.arange(8, device=device).view(2, 4) % weight.shape[0]

    def run() -> torch.Tensor:
        return decoder_of(model)(input_ids=ids, use_cache=False)[0]

    with evaluation_mode(model):
        return fuse_shared_inputs(model, run)


def autotune_kernels(
    model: PreTrainedModel,
    tokens: Sequence[int] = BUCKETS,
    *,
    optimize_for: str = "memory",
    max_extra_bytes: int | None = None,
) -> KernelReport:
    """Measures the kernels for each shape of sparse layer of `model`, where it stands now, and gives layers the forms
    that pay. What is measured is kept on disk, so that this takes seconds the next time. Without it a rule of
    thumb chooses the kernels, and layers stay packed alone.

    `configure` does this by itself with `optimize_for="speed"`; after `model.to("cuda")` call it. The report is
    `model.kernel_report` too.

    Args:
        tokens: for which numbers of tokens in a forward pass; each stands for those down to the half of it.
        optimize_for: "memory": at most 0.65 of a layer's dense bytes; "speed" (experimental): more, where it is
            faster.
        max_extra_bytes: the most that "speed" may add to the whole model; None: no limit.

    Raises:
        ValueError: the model has no sparse layers, or an argument is out of range.
        TypeError: an argument is of another type.
    """
    layers = sparse_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no sparse layers; prune it, or load a sparse checkpoint")
    RuntimeConfig(optimize_for=optimize_for, max_extra_bytes=max_extra_bytes)  # checks them
    unknown = [number for number in tokens if number not in BUCKETS]
    if unknown or not tokens:
        raise ValueError(f"tokens={list(tokens)!r} must be some of {', '.join(map(str, BUCKETS))}")
    report = autotune(layers, tuple(tokens), optimize_for=optimize_for, max_extra_bytes=max_extra_bytes)
    model.kernel_report = report  # type: ignore[assignment]
    return report
