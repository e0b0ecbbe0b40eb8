"""What a model must be to be pruned; then its report, and what makes it a sparse model for transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers.auto import AutoHfQuantizer

from ..blocks import decoder_of, use_eager_experts
from ..blocks.running import device_of
from ..checkpoint import (
    check_reversible,
    describe_model,
    facts_of,
    forget_conversions,
    is_offloaded,
    logical_parameters,
    made_with,
    record_layers,
    sparse_experts,
    sparse_modules,
)
from ..config import QUANT_METHOD, RECORDED, SparsityConfig
from ..kernels import product_dtype
from ..pruners import METHODS
from ..report import Change, SparsityReport
from ..version import library_versions
from .job import Job
from .layer import row_of
from .memory import peak_memory


def record_settings(config: SparsityConfig) -> SparsityConfig:
    """The settings as they are saved with the model: the data may be gone by then."""
    described = config.to_dict()
    return config.changed(dataset=described["dataset"], tokenizer=described["tokenizer"])


def settings_of(config: SparsityConfig) -> dict[str, Any]:
    """The settings as a report and a journal hold them: without the list of layers."""
    settings = config.to_dict()
    for name in RECORDED:
        settings.pop(name, None)
    return settings


def make_report(job: Job) -> SparsityReport:
    """The report on a model that has just been pruned."""
    model, config = job.place.model, job.config
    dtype = getattr(torch, config.calibration_dtype) if config.calibration_dtype else model.dtype
    products = str(product_dtype(dtype, device_of(model))).removeprefix("torch.")
    return SparsityReport(
        config=settings_of(config),
        calibration={} if job.data is None else job.data.description,
        layers=[row for block in job.pruned for row in block.layers],
        reconstruction=[block.reconstruction for block in job.pruned if block.reconstruction is not None],
        skipped=job.skipped,
        base_model=describe_model(model),
        base_revision=facts_of(model).commit,
        num_parameters=job.num_parameters,
        peak_memory_bytes=peak_memory(),
        product_dtype=None if job.data is None else products,
        versions=library_versions("torch", "transformers", "accelerate", "datasets"),
    )


def as_pruned(config: SparsityConfig, made: SparsityConfig | None) -> SparsityConfig:
    """The settings of a sparse model that was made of one of ours, by the settings `made`, if by quantising alone: how
    that was pruned, and how values are stored now. Of any other model, those that it was pruned with."""
    if made is None or METHODS[config.method].recognise is None:
        return config
    return made.changed(values=config.values, group_size=config.group_size, storage=config.storage)


def quantised_report(report: SparsityReport, earlier: SparsityReport, config: SparsityConfig) -> SparsityReport:
    """The report on a model of ours whose values were quantised: that on the sparse model that it was made of, with
    the sizes of now, and the change. `config`: of `as_pruned`."""
    rows = {row.name: row for row in earlier.layers}
    for row in report.layers:
        if row.name in rows:
            row.relative_output_error = rows[row.name].relative_output_error
            row.sensitivity = rows[row.name].sensitivity
    dataset = report.calibration.get("dataset")
    change = Change("quantised", by=config.values, dataset=dataset if isinstance(dataset, str) else None)
    return replace(
        earlier,
        config=settings_of(config),
        layers=report.layers,
        changes=[*earlier.changes, change],
        versions=report.versions,
        fingerprint=None,
    )


def report_of(model: PreTrainedModel, config: SparsityConfig) -> SparsityReport:
    """The report on a model whose layers were packed elsewhere, as `config` has it."""
    return SparsityReport(
        config=settings_of(config),
        layers=[row_of(name, module) for name, module in sparse_modules(decoder_of(model)).items()],
        base_model=describe_model(model),
        base_revision=facts_of(model).commit,
        num_parameters=logical_parameters(model),
        versions=library_versions("torch", "transformers"),
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


def note_values(model: PreTrainedModel) -> None:
    """Lets the report of a sparse model say how its values are stored now; the weights are those of the report."""
    report, config = facts_of(model).report, made_with(model)
    if report is None or config is None or report.config.get("values") == config.values:
        return
    modules = sparse_modules(decoder_of(model))
    for row in report.layers:
        if row.name in modules:
            row.packed_bytes = modules[row.name].packed_bytes
    settings = {name: value for name, value in report.config.items() if name not in ("values", "group_size")}
    report.config = settings | config.quantisation


def check_model(model: PreTrainedModel, config: SparsityConfig) -> None:
    """Raises TypeError or ValueError for a model that cannot be pruned as it is."""
    if not isinstance(config, SparsityConfig):
        raise TypeError(f"config must be a SparsityConfig, found {type(config).__name__}")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, found {type(model).__name__}")
    recognises = METHODS[config.method].recognise is not None
    if recognises and "pattern" in config.given:
        raise ValueError(
            f"method={config.method!r} finds the pattern of each layer: leave pattern={config.pattern!r} out"
        )
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "tensors made under torch.inference_mode() cannot be changed nor learn: load the model, and prune it, "
            "outside of it (torch.no_grad() is no hindrance)"
        )
    made, is_sparse = made_with(model), bool(sparse_modules(model))
    if is_sparse and made is not None and made.values is not None:
        raise ValueError(
            f"the values of the model are {made.values} already: take the model that it was made from, or "
            "model.dequantize_values() first"
        )
    takes_sparse = config.values is not None or (made is not None and made.method == config.method)
    if is_sparse and not (recognises and made is not None and takes_sparse):
        raise ValueError(
            "the model is sparse already: model.dequantize() makes it dense again, and "
            "SparsityConfig('existing', values=...) quantises its values"
        )
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not is_sparse:
        method = quantizer.quantization_config.quant_method
        raise ValueError(f"the model is quantized ({method}); prune the model that it was made from")
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        raise ValueError("the model, or a part of it, is compiled; prune it first, then compile it")
    # PEFT puts a layer into its own, as `base_layer`; what an adapter of another kind is, transformers says.
    inside = any(name.endswith(".base_layer") for name, _ in model.named_modules())
    if inside or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("the model carries an adapter; merge it, or prune the model before adding one")
    if config.storage != "packed":
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
