"""Pruning a loaded model in place."""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging

from ..allocation import Allocation
from ..calibration import (
    BlockReplay,
    CalibrationTokens,
    DecoderBlocks,
    ExpertStack,
    calibration_tokens,
    eager_experts,
    evaluation_mode,
    find_blocks,
    read_tokenizer,
    tell_default_text,
    use_eager_experts,
    usual_context,
)
from ..checkpoint import (
    check_reversible,
    describe_model,
    forget_conversions,
    is_offloaded,
    record_layers,
    sparse_experts,
    sparse_modules,
)
from ..choosing import choose_method
from ..config import (
    AUTO,
    DENSE_CONFIG_KEY,
    EXECUTION_SETTINGS,
    QUANT_METHOD,
    RECORDED,
    SparsityConfig,
    describe_source,
)
from ..dataset import is_token_ids, needs_tokenizer
from ..distributed import Processes, current
from ..evaluation import RECORDS, mark_weights
from ..execution import apply_settings
from ..hub import tag_model
from ..layer_dropping import check_drop, drop_blocks, measure_drop
from ..memory import peak_memory
from ..pruning import Replaced, prune_blocks
from ..reconstruction import HELD_OUT
from ..report import LayerReport, MethodChoice, PrunedBlock, SparsityReport
from ..sensitivity import leave_dense, measure_allocation
from ..targets import Layer, find_targets
from ..version import library_versions

logger = logging.get_logger(__name__)


def sparsify(
    model: PreTrainedModel,
    config: SparsityConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    restore_on_error: bool = True,
) -> SparsityReport:
    """Prunes a loaded model in place: drops decoder blocks, where `drop_layers` says so, then swaps in `SparseLinear`.

    Everything that can be checked is checked before a weight is touched, one calibration sample run through the dense
    model included. The model is then a sparse one for `save_pretrained`, `push_to_hub`, `Trainer` and `dequantize`;
    its report is `model.sparsity_report`.

    Where a process group of torch.distributed is initialised, all of its processes must call this with the same
    settings: each runs a part of the calibration samples and prunes a part of the layers, and all end with the same
    model.

    Args:
        model: a decoder-only model in float32, bfloat16 or float16, on one device, on several, or offloaded by
            accelerate.
        config: what to do.
        tokenizer: for calibration text; None takes `config.tokenizer`, then the model's own name.
        restore_on_error: on an error or Ctrl-C give the model its dense modules and its dropped blocks back. They stay
            in memory until the end for that; False lets each go as it is pruned, and leaves a model to throw away.

    Raises:
        TypeError, ValueError: the model cannot be pruned, or the settings or the data do not fit it.
        ArithmeticError: a layer's Gram matrix stays singular.
        ConnectionError: the calibration data cannot be read from the Hub, or another process has stopped.
    """
    check_model(model, config)
    config = config.fitted(usual_context(model.config))
    started = time.perf_counter()
    processes = current()
    blocks = find_blocks(model)
    if config.drop_layers is not None:
        check_drop(blocks, config.drop_layers, config.modules_to_not_convert)
    targets, skipped = find_targets(blocks, config)
    processes.agree({"model": type(model).__name__, "blocks": len(blocks.blocks), **config.to_dict()})
    recorded = record_settings(config)
    with evaluation_mode(model), torch.no_grad():
        data = processes.once(lambda: draw_tokens(model, config, tokenizer))
    dropped, choice, allocation = None, None, None
    with ExitStack() as undo:
        if config.drop_layers is not None and data is not None:
            with evaluation_mode(model), torch.no_grad():
                dropped = measure_drop(
                    blocks, config.drop_layers, start_replay(blocks, config, data, processes), processes=processes
                )
            if restore_on_error:
                undo.callback(drop_blocks(blocks, dropped.blocks))
            else:
                drop_blocks(blocks, dropped.blocks)
            targets, skipped = find_targets(blocks, config)
        num_parameters = model.num_parameters()
        pruned: list[PrunedBlock] = []
        if config.pattern is not None:
            pruned, allocation, choice = _prune(
                blocks, targets, skipped, config, data, processes, Replaced() if restore_on_error else None
            )
        undo.pop_all()

    attach(model, recorded)
    if config.tokenizer is not None:
        model.calibration_tokenizer = config.tokenizer  # the object or the whole path, for `push_to_hub`
    note_sensitivities([row for block in pruned for row in block.layers], allocation)
    report = make_report(model, recorded, num_parameters, {} if data is None else data.description, pruned, skipped)
    report.choice, report.dropped = choice, dropped
    report.seconds = round(time.perf_counter() - started, 2)
    model.sparsity_report = report  # type: ignore[assignment]
    mark_weights(model, pruned_here=True)
    tag_model(model, report, recorded)
    _apply_settings(model, config)
    return report


def _apply_settings(model: PreTrainedModel, config: SparsityConfig) -> None:
    """How sparse layers run. What has no room for it is a pruned model all the same."""
    try:
        apply_settings(model, config)
    except (torch.OutOfMemoryError, MemoryError) as error:
        settings = ", ".join(f"{name}={getattr(config, name)!r}" for name in EXECUTION_SETTINGS)
        logger.warning(
            f"The model is pruned, but the memory does not suffice for all of {settings} ({error}): save it, and load "
            "it with less."
        )


def _prune(
    blocks: DecoderBlocks,
    targets: list[dict[str, Layer]],
    skipped: dict[str, str],
    config: SparsityConfig,
    data: CalibrationTokens | None,
    processes: Processes,
    replaced: Replaced | None,
) -> tuple[list[PrunedBlock], Allocation | None, MethodChoice | None]:
    """Measures the model without dropped blocks, where that is asked for, and prunes it. An error puts back what
    `replaced` was given. What the allocation leaves dense is added to `skipped`."""
    allocation, choice = None, None
    stacked = any(isinstance(layer, ExpertStack) for layers in targets for layer in layers.values())
    with (
        evaluation_mode(blocks.model),
        eager_experts(blocks.model) if stacked else nullcontext(),
        torch.no_grad(),
    ):
        replay = None
        if data is not None and config.prunes_with_data:
            asked = config

            def replayed() -> BlockReplay:
                return start_replay(blocks, asked, data, processes)

            if config.allocation == "owl":
                allocation = measure_allocation(blocks, targets, config, replayed(), processes=processes)
                skipped |= leave_dense(blocks, targets, allocation)
            if config.method == AUTO:
                own = own_patterns(allocation)
                choice = choose_method(blocks, targets, config, replayed(), processes=processes, patterns=own)
                config = config.as_chosen(choice.method, choice.reconstruct)
            replay = replayed()
        try:
            pruned = prune_blocks(
                blocks, targets, config, replay, replaced, processes=processes, patterns=own_patterns(allocation)
            )
        except BaseException:
            if replaced is not None:
                replaced.restore(blocks.decoder)
            raise
    return pruned, allocation, choice


def start_replay(
    blocks: DecoderBlocks, config: SparsityConfig, data: CalibrationTokens, processes: Processes
) -> BlockReplay:
    """This process's calibration activations at the first block."""
    skip_first = data.begins_with_bos and not config.bos_in_statistics
    batch_size = replay_batch_size(config)
    ids = share_tokens(data.ids, batch_size, processes)
    return BlockReplay(blocks, ids, batch_size, skip_first, dtype=calibration_dtype(config))


def replay_batch_size(config: SparsityConfig) -> int:
    """Samples in a batch: `config.batch_size`, or less where some batches are to be held out."""
    if config.reconstruct is None and config.method != AUTO:
        return config.batch_size
    return max(1, min(config.batch_size, config.num_samples // HELD_OUT))


def record_settings(config: SparsityConfig) -> SparsityConfig:
    """The settings as they are saved with the model: the data may be gone by then."""
    recorded: SparsityConfig = SparsityConfig.from_dict(config.to_dict())
    for name in EXECUTION_SETTINGS:
        setattr(recorded, name, getattr(config, name))
    return recorded


def settings_of(config: SparsityConfig) -> dict[str, Any]:
    """The settings as a report and a journal hold them: without the list of layers."""
    settings = config.to_dict()
    for name in RECORDED:
        settings.pop(name)
    return settings


def own_patterns(allocation: Allocation | None) -> dict[str, str]:
    """The patterns of the layers that have their own, by path."""
    patterns = {} if allocation is None else allocation.patterns
    return {path: pattern for path, pattern in patterns.items() if pattern is not None}


def note_sensitivities(rows: list[LayerReport], allocation: Allocation | None) -> None:
    """Writes into the rows of a report what decided on the layers' patterns."""
    for row in rows:
        row.sensitivity = None if allocation is None else allocation.sensitivities[row.name]


def make_report(
    model: PreTrainedModel,
    config: SparsityConfig,
    num_parameters: int,
    calibration: dict[str, Any],
    pruned: list[PrunedBlock],
    skipped: dict[str, str],
) -> SparsityReport:
    """The report on a model that has just been pruned with `config`, as `record_settings` gave it. `num_parameters` is
    from before that: packed weights count less."""
    return SparsityReport(
        config=settings_of(config),
        calibration=calibration,
        layers=[row for block in pruned for row in block.layers],
        reconstruction=[block.reconstruction for block in pruned if block.reconstruction is not None],
        skipped=skipped,
        base_model=describe_model(model),
        base_revision=getattr(model, "hub_commit", None),
        num_parameters=num_parameters,
        peak_memory_bytes=peak_memory(),
        versions=library_versions("torch", "transformers", "accelerate", "datasets"),
    )


def attach(model: PreTrainedModel, config: SparsityConfig) -> None:
    """Makes a model that holds sparse modules a sparse model for transformers: config, quantizer and flags. One that
    has merely lost blocks stays a dense one, whose config keeps the settings."""
    record_layers(model, config)
    forget_conversions(model)
    for name in RECORDS:
        setattr(model, name, None)
    if config.pattern is None:
        model.is_without_blocks = True
        setattr(model.config, DENSE_CONFIG_KEY, config.to_dict())
        return
    if hasattr(model.config, DENSE_CONFIG_KEY):  # it had lost blocks before
        delattr(model.config, DENSE_CONFIG_KEY)
    if sparse_experts(model):
        use_eager_experts(model)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.is_quantized = True  # type: ignore[assignment]
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
    usual = SparsityConfig("magnitude", dataset=None)
    ignored = [f"{name}={value!r}" for name, value in config.unread.items() if value != getattr(usual, name)]
    if ignored:
        logger.warning(f"method={config.method!r} does not read {', '.join(ignored)}: without effect here")
    if config.reconstruct is not None and is_offloaded(model):
        raise ValueError(
            "reconstruct needs the weights of a block in memory, and accelerate has offloaded some: load the model "
            "without offloading, or prune from disk to disk with prune_checkpoint"
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


def load_tokenizer(config: SparsityConfig, source: Any, **arguments: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer for the calibration text: `config.tokenizer`, or the one of `source`, loaded with `arguments` of
    `from_pretrained`. None where none is needed.

    Raises:
        ValueError: one is needed, and none can be loaded.
    """
    if not config.needs_data or is_token_ids(config.dataset):
        return None
    if isinstance(config.tokenizer, PreTrainedTokenizerBase):
        return config.tokenizer
    if config.tokenizer is not None:  # another repository than the weights': it has its own revisions and folders
        source = config.tokenizer
        arguments = {k: v for k, v in arguments.items() if k not in ("revision", "subfolder", "gguf_file")}
    try:
        return read_tokenizer(source, **arguments)
    except Exception as error:  # transformers and huggingface_hub raise many kinds here
        if not needs_tokenizer(config.dataset):
            return None
        raise ValueError(
            f"no tokenizer could be loaded from {describe_source(source)!r}: name one with "
            f"SparsityConfig(tokenizer=...), or pass token ids as the dataset; {error}"
        ) from error


def draw_tokens(
    model: PreTrainedModel, config: SparsityConfig, tokenizer: PreTrainedTokenizerBase | None
) -> CalibrationTokens | None:
    """The calibration samples; None for a method without data."""
    if not config.needs_data:
        return None
    tokenizer = tokenizer or load_tokenizer(config, model.name_or_path)
    if "dataset" not in config.given and tokenizer is not None:
        logger.warning(tell_default_text(config.dataset, tokenizer))
    return calibration_tokens(config, model, tokenizer)


def calibration_dtype(config: SparsityConfig) -> torch.dtype | None:
    """The dtype of `config.calibration_dtype`."""
    return None if config.calibration_dtype is None else getattr(torch, config.calibration_dtype)


def share_tokens(ids: torch.Tensor, batch_size: int, processes: Processes) -> torch.Tensor:
    """This process's part of the samples [num_samples, seq_len]. Raises ValueError where it would have none."""
    if len(ids) < processes.size:
        raise ValueError(
            f"{processes.size} processes share num_samples={len(ids)} calibration samples: start at most "
            f"{len(ids)} processes, or use more samples"
        )
    share = processes.share(-(-len(ids) // batch_size))
    if len(ids) < processes.size * batch_size:
        share, batch_size = processes.share(len(ids)), 1
    # Whole batches, as one process would have them: the same sums come out rounded in the same way.
    return ids[share.start * batch_size : share.stop * batch_size]
