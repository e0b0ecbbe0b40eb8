"""The functions that every path ends in: prune a model in place, or one layer without a model."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers.auto import AutoHfQuantizer

from .calibration import (
    BlockReplay,
    CalibrationTokens,
    ExpertStack,
    calibration_tokens,
    eager_experts,
    evaluation_mode,
    find_blocks,
    read_tokenizer,
    use_eager_experts,
)
from .checkpoint import describe_model, layer_records, put, sparse_experts, sparse_modules
from .config import EXECUTION_SETTINGS, QUANT_METHOD, SparsityConfig, describe_source, is_token_ids
from .execution import apply_settings
from .pattern import Pattern
from .pruners import METHODS
from .pruning import find_targets, prune_blocks
from .report import SparsityReport
from .version import library_versions


def sparsify(
    model: PreTrainedModel,
    config: SparsityConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    restore_on_error: bool = True,
) -> SparsityReport:
    """Prunes a loaded model in place and swaps in `SparseLinear`.

    Everything that can be checked is checked before a weight is touched, one calibration sample run through the dense
    model included. The model is then a sparse one for `save_pretrained`, `push_to_hub`, `Trainer` and `dequantize`;
    its report is `model.sparsity_report`.

    Args:
        model: a decoder-only model in float32, bfloat16 or float16, on one device, on several, or offloaded by
            accelerate.
        config: what to do.
        tokenizer: for calibration text; None takes `config.tokenizer`, then the model's own name.
        restore_on_error: on an error or Ctrl-C give the model its dense modules back. They stay in memory until the
            end for that; False lets each go as it is pruned, and leaves a model to throw away.

    Raises:
        TypeError, ValueError: the model cannot be pruned, or the settings or the data do not fit it.
        ArithmeticError: a layer's Gram matrix stays singular.
        ConnectionError: the calibration data cannot be read from the Hub.
    """
    _check_model(model, config)
    started = time.perf_counter()
    blocks = find_blocks(model)
    targets, skipped = find_targets(blocks, config)
    recorded = SparsityConfig.from_dict(config.to_dict())  # the data may be gone when the model is saved
    for name in EXECUTION_SETTINGS:
        setattr(recorded, name, getattr(config, name))

    num_parameters = model.num_parameters()
    stacked = any(isinstance(layer, ExpertStack) for layers in targets for layer in layers.values())
    with evaluation_mode(model), eager_experts(model) if stacked else nullcontext(), torch.no_grad():
        data = _calibration(model, config, tokenizer)
        replay = None
        if data is not None:
            skip_first = data.begins_with_bos and not config.bos_in_statistics
            replay = BlockReplay(blocks, data.ids, config.batch_size, skip_first)
        replaced: dict[str, nn.Module | nn.Parameter] = {}
        try:
            rows = prune_blocks(blocks, targets, config, replay, replaced if restore_on_error else None)
        except BaseException:
            for path, dense in replaced.items():
                put(blocks.decoder, path, dense)
            raise

    attach(model, recorded)
    apply_settings(model, config)
    if config.tokenizer is not None:
        model.calibration_tokenizer = config.tokenizer  # the object or the whole path, for `push_to_hub`
    settings = recorded.to_dict()
    settings.pop("layers")
    report = SparsityReport(
        config=settings,
        calibration={} if data is None else data.description,
        layers=rows,
        skipped=skipped,
        base_model=describe_model(model),
        base_revision=getattr(model, "hub_commit", None),
        num_parameters=num_parameters,
        seconds=round(time.perf_counter() - started, 2),
        peak_memory_bytes=peak_memory(),
        versions=library_versions("torch", "transformers", "accelerate", "datasets"),
    )
    model.sparsity_report = report  # type: ignore[assignment]
    return report


@torch.no_grad()
def prune_weight(
    weight: torch.Tensor, inputs: torch.Tensor | None, *, method: str, pattern: str | float | Pattern, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prunes one layer without a model.

    Args:
        weight: [out, in], any floating dtype.
        inputs: [tokens, in] or [samples, tokens, in]; None for a method without data.
        method, pattern, settings: as in `SparsityConfig`; a setting that the method does not take is an error.

    Returns:
        The pruned weight in its dtype and the mask (bool, True = kept), both [out, in].

    Raises:
        TypeError: an unknown setting.
        ValueError: an unknown method or pattern, shapes that do not fit, NaN or Inf.
        ArithmeticError: the Gram matrix stays singular.
    """
    chosen, parsed = METHODS[SparsityConfig(method).method], Pattern(pattern)
    unknown = set(settings) - set(chosen.settings)
    if unknown:
        allowed = ", ".join(chosen.settings) or "none"
        raise TypeError(f"method={method!r} has no setting {sorted(unknown)[0]!r}; it takes: {allowed}")
    SparsityConfig(method, pattern, **settings)  # validates them
    for name, tensor in {"weight": weight, "inputs": inputs}.items():
        if not isinstance(tensor, torch.Tensor) and (name == "weight" or tensor is not None):
            raise TypeError(f"{name} must be a tensor, found {type(tensor).__name__}")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be floating point [out, in], found {weight.dtype} {list(weight.shape)}")
    parsed.check_in_features(weight.shape[1])
    if not bool(weight.isfinite().all()):
        raise ValueError("weight holds NaN or Inf")
    statistics = None
    if chosen.statistics is not None:
        if inputs is None or inputs.dim() not in (2, 3) or inputs.shape[-1] != weight.shape[1] or not inputs.numel():
            found = None if inputs is None else list(inputs.shape)
            raise ValueError(
                f"inputs must be [tokens, {weight.shape[1]}] or [samples, tokens, {weight.shape[1]}], found {found}"
            )
        if not bool(inputs.isfinite().all()):
            raise ValueError("inputs hold NaN or Inf")
        statistics = chosen.statistics(weight.shape[1], weight.device)
        statistics.update(inputs)
        if not bool(statistics.squared_norms.isfinite().all()):
            raise ValueError("inputs are too large: their squares overflow to Inf in float32")
    return chosen.prune(weight, statistics, parsed, **settings)


def attach(model: PreTrainedModel, config: SparsityConfig) -> None:
    """Makes a model that holds sparse modules a sparse model for transformers: config, quantizer and flags."""
    config.layers = layer_records(model)
    if sparse_experts(model):
        use_eager_experts(model)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = QUANT_METHOD  # type: ignore[assignment]
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process where the system tells, and of its GPU where one was used."""
    peak = {}
    try:
        # Linux only; ru_maxrss is no substitute, because it is inherited over exec.
        with open("/proc/self/status") as status:
            peak["process"] = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


def _check_model(model: PreTrainedModel, config: SparsityConfig) -> None:
    if not isinstance(config, SparsityConfig):
        raise TypeError(f"config must be a SparsityConfig, found {type(config).__name__}")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, found {type(model).__name__}")
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
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed ZeRO-3 holds a part of each weight; prune in a process without it, then load the result"
        )
    sharded = next((name for name, p in model.named_parameters() if type(p.data).__name__ == "DTensor"), None)
    if sharded is not None:
        raise ValueError(
            f"{sharded} is spread over processes (tensor parallel or FSDP); prune in one process, then load it"
        )


def load_tokenizer(config: SparsityConfig, source: Any, **arguments: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer for the calibration text: `config.tokenizer`, or the one of `source`, loaded with `arguments` of
    `from_pretrained`. None where none is needed.

    Raises:
        ValueError: one is needed, and none can be loaded.
    """
    if METHODS[config.method].statistics is None or is_token_ids(config.dataset):
        return None
    if isinstance(config.tokenizer, PreTrainedTokenizerBase):
        return config.tokenizer
    if config.tokenizer is not None:  # another repository than the weights': it has its own revisions and folders
        source = config.tokenizer
        arguments = {k: v for k, v in arguments.items() if k not in ("revision", "subfolder", "gguf_file")}
    try:
        return read_tokenizer(source, **arguments)
    except Exception as error:  # transformers and huggingface_hub raise many kinds here
        if isinstance(config.dataset, str) and config.dataset == "self":
            return None
        raise ValueError(
            f"no tokenizer could be loaded from {describe_source(source)!r}: name one with "
            f"SparsityConfig(tokenizer=...), or pass token ids as the dataset; {error}"
        ) from error


def _calibration(
    model: PreTrainedModel, config: SparsityConfig, tokenizer: PreTrainedTokenizerBase | None
) -> CalibrationTokens | None:
    if METHODS[config.method].statistics is None:
        return None
    return calibration_tokens(config, model, tokenizer or load_tokenizer(config, model.name_or_path))
