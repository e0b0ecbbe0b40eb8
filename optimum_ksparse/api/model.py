"""Pruning a loaded model in place."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers.auto import AutoHfQuantizer

from ..blocks import find_blocks, use_eager_experts
from ..checkpoint import (
    check_reversible,
    describe_model,
    facts_of,
    forget_conversions,
    is_offloaded,
    record_layers,
    sparse_experts,
    sparse_modules,
)
from ..config import QUANT_METHOD, RECORDED, SparsityConfig
from ..data import usual_context
from ..evaluation import mark_weights
from ..hub import card_of_source, tag_model
from ..pruning.distributed import current
from ..pruning.job import Job, Place
from ..pruning.memory import peak_memory
from ..pruning.plan import run
from ..pruning.tokens import load_tokenizer
from ..report import SparsityReport
from ..version import library_versions


def sparsify(
    model: PreTrainedModel,
    config: SparsityConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    restore_on_error: bool = False,
) -> SparsityReport:
    """Prunes a loaded model in place: swaps in `SparseLinear`.

    Everything that can be checked is checked before a weight is touched, one calibration sample run through the dense
    model included. The model is then a sparse one for `save_pretrained`, `push_to_hub`, `Trainer` and `dequantize`;
    its report is `model.sparsity_report`.

    Where a process group of torch.distributed is initialised, all of its processes must call this with the same
    settings: each runs a part of the calibration samples and prunes a part of the layers, and all end with the same
    model.

    Args:
        model: a decoder-only model in float32, bfloat16 or float16, on one device or on several.
        config: what to do.
        tokenizer: for calibration text; None takes `config.tokenizer`, then the model's own name.
        restore_on_error: keep all dense weights in memory until the end, and on an error or Ctrl-C put them back. By
            default each goes as it is pruned, and an error leaves a model to throw away, which cannot be saved.

    Raises:
        TypeError, ValueError: the model cannot be pruned, or the settings or the data do not fit it.
        ArithmeticError: a layer's Gram matrix stays singular.
        ConnectionError: the calibration data cannot be read from the Hub, or another process has stopped.
    """
    check_model(model, config)
    config = config.fitted(usual_context(model.config))
    started = time.perf_counter()
    processes, blocks = current(), find_blocks(model)
    processes.agree({"model": type(model).__name__, "blocks": len(blocks.blocks), **config.to_dict()})
    recorded = record_settings(config)
    load = partial(load_tokenizer, config, model.name_or_path)
    place = Place(model, blocks, processes, (lambda: tokenizer) if tokenizer else load)
    try:
        job = run(place, config, restore_on_error)
    except BaseException as error:
        if sparse_modules(model):
            error.add_note("The model is pruned in part, and cannot be saved: load it again.")
        raise
    attach(model, recorded)
    if config.tokenizer is not None:
        facts_of(model).tokenizer = config.tokenizer  # the object or the whole path, for `push_to_hub`
    report = make_report(job, recorded)
    report.base_card = processes.once(lambda: card_of_source(model))
    report.seconds = round(time.perf_counter() - started, 2)
    facts_of(model).report = report
    mark_weights(model, pruned_here=True)
    tag_model(model, report, recorded)
    return report


def record_settings(config: SparsityConfig) -> SparsityConfig:
    """The settings as they are saved with the model: the data may be gone by then."""
    recorded: SparsityConfig = SparsityConfig.from_dict(config.to_dict())
    return recorded


def settings_of(config: SparsityConfig) -> dict[str, Any]:
    """The settings as a report and a journal hold them: without the list of layers."""
    settings = config.to_dict()
    for name in RECORDED:
        settings.pop(name)
    return settings


def make_report(job: Job, config: SparsityConfig) -> SparsityReport:
    """The report on a model that has just been pruned with `config`, as `record_settings` gave it."""
    model = job.place.model
    return SparsityReport(
        config=settings_of(config),
        calibration={} if job.data is None else job.data.description,
        layers=[row for block in job.pruned for row in block.layers],
        reconstruction=[block.reconstruction for block in job.pruned if block.reconstruction is not None],
        skipped=job.skipped,
        choice=job.choice,
        base_model=describe_model(model),
        base_revision=facts_of(model).commit,
        num_parameters=job.num_parameters,
        peak_memory_bytes=peak_memory(),
        versions=library_versions("torch", "transformers", "accelerate", "datasets"),
    )


def attach(model: PreTrainedModel, config: SparsityConfig) -> None:
    """Makes a model that holds sparse modules a sparse model for transformers: config, quantizer and flags."""
    record_layers(model, config)
    forget_conversions(model)
    facts_of(model).forget()
    if sparse_experts(model):
        use_eager_experts(model)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.quantization_method = QUANT_METHOD  # type: ignore[assignment]
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def check_model(model: PreTrainedModel, config: SparsityConfig) -> None:
    """Raises TypeError or ValueError for a model that cannot be pruned as it is."""
    if not isinstance(config, SparsityConfig):
        raise TypeError(f"config must be a SparsityConfig, found {type(config).__name__}")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, found {type(model).__name__}")
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "tensors made under torch.inference_mode() cannot be changed nor learn: load the model, and prune it, "
            "outside of it (torch.no_grad() is no hindrance)"
        )
    if sparse_modules(model):
        raise ValueError("the model is sparse already; model.dequantize() makes it dense again")
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        method = quantizer.quantization_config.quant_method
        raise ValueError(f"the model is quantized ({method}); prune the model that it was made from")
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        raise ValueError("the model, or a part of it, is compiled; prune it first, then compile it")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("the model carries an adapter; merge it, or prune the model before adding one")
    if config.storage == "dense":
        check_reversible(model)
    if is_offloaded(model):
        raise ValueError(
            "accelerate has offloaded weights of the model to memory or disk: prune its checkpoint with "
            "prune_checkpoint (prune --stream), block by block, or load it where all of it has room"
        )
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed ZeRO-3 holds a part of each weight; prune in a process without it, then load the result"
        )
    sharded = next((name for name, p in model.named_parameters() if type(p.data).__name__ == "DTensor"), None)
    if sharded is not None:
        raise ValueError(
            f"{sharded} is spread over processes (tensor parallel or FSDP); prune in one process, then load it"
        )
