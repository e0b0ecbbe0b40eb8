"""`from_pretrained`: prunes while loading, and finishes the loading of checkpoints that are sparse already."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.utils import CONFIG_NAME, logging

from ..adapters import MergeReport
from ..checkpoint import (
    check_finite,
    drop_guard,
    drop_record,
    facts_of,
    forget_conversions,
    is_dense_record,
    is_our_record,
    made_with,
    random_weights,
    sparse_experts,
    sparse_modules,
    sparsify_dense,
)
from ..checks import check_keys
from ..config import DENSE_CONFIG_KEY, FLAT_SETTINGS, RUN_TIME_SETTINGS, SparsityConfig, recorded_settings
from ..evaluation import EvaluationResults, mark_weights
from ..hub import tag_model
from ..pattern import Pattern
from ..pruning.model import attach
from ..records import MERGE_REPORT_NAME, REPORT_NAME, RESULTS_NAME
from ..report import SparsityReport
from ..runtime import RuntimeConfig, configure
from .describing import describe_from_pretrained
from .source import Source, loading_from, recover_source

logger = logging.get_logger(__name__)

_PARALLEL_ARGUMENTS = ("tp_plan", "tp_size", "distributed_config", "device_mesh")


def from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of `from_pretrained` of models: `sparsity_config`, which signature and docstring name, is a
    `quantization_config`, by which the quantizer prunes; and the loading of sparse checkpoints is finished. Any other
    model is returned as it is; where it came from is noted outside of it."""

    @functools.wraps(original)
    def wrapper(cls: type[PreTrainedModel], name: Any = None, *args: Any, **kwargs: Any) -> Any:
        name = kwargs.pop("pretrained_model_name_or_path", name)
        config, runtime = _take_config(kwargs), _take_runtime(kwargs)
        if isinstance(kwargs.get("config"), PreTrainedConfig):  # it may have been read before this package was there
            drop_guard(vars(kwargs["config"]))
        source = Source.read(name, kwargs)
        recorded = None if config is None else _prepare(config, source, kwargs)
        with loading_from(source):
            result = original(cls, name, *args, **kwargs)
        model = result[0] if kwargs.get("output_loading_info") else result
        source.note(model)
        if config is not None and recorded is None:
            if not sparse_modules(model):  # from a GGUF file, which has a quantizer of its own
                source.prune(model, config)
        elif not _finish(model, config, source):
            return result
        if runtime is not None:
            configure(model, runtime)
        experts = kwargs.get("experts_implementation")
        if experts not in (None, "eager") and sparse_experts(model):
            logger.warning(f'Sparse experts run with experts_implementation="eager" only, not with {experts!r}.')
        return result

    describe_from_pretrained(wrapper)
    return wrapper


def _take_config(kwargs: dict[str, Any]) -> SparsityConfig | None:
    """Takes the `SparsityConfig` out of the arguments; None where there is none."""
    config, name = kwargs.pop("sparsity_config", None), "sparsity_config"
    if config is not None and not isinstance(config, SparsityConfig | dict):
        raise TypeError(
            f"sparsity_config must be a SparsityConfig or a dict of its settings, found {type(config).__name__}"
        )
    if is_our_record(kwargs.get("quantization_config")):
        if config is not None:
            raise ValueError("sparsity_config and quantization_config both hold sparsity settings; pass one of them")
        config, name = kwargs.pop("quantization_config"), "quantization_config"
    if not isinstance(config, dict):
        return config
    settings = {name: value for name, value in config.items() if name != "quant_method"}
    check_keys(settings, FLAT_SETTINGS, name)
    return SparsityConfig.from_flat(**settings)


def _take_runtime(kwargs: dict[str, Any]) -> RuntimeConfig | None:
    """Takes the `RuntimeConfig` out of the arguments, or makes one of its settings; None where there is none."""
    runtime = kwargs.pop("runtime_config", None)
    if isinstance(runtime, dict):
        return RuntimeConfig(**runtime)
    if runtime is not None and not isinstance(runtime, RuntimeConfig):
        raise TypeError(f"runtime_config must be a RuntimeConfig, found {type(runtime).__name__}")
    return runtime


def _prepare(config: SparsityConfig, source: Source, kwargs: dict[str, Any]) -> SparsityConfig | None:
    """Checks, before anything is loaded, what pruning needs, and puts the settings where the quantizer is found by
    them. Where the checkpoint is sparse already the settings with which it was pruned must be the same, and are
    returned."""
    recover_source(source.name, kwargs.get("subfolder"))
    recorded, other = _recorded_config(source), kwargs.get("quantization_config")
    if recorded is not None:
        _check_agreement(config, recorded)
    else:
        _check_one_process(kwargs)
    if recorded is None and kwargs.get("gguf_file") is not None and isinstance(other, GgufConfig | None):
        if other is not None and not other.dequantize:
            raise ValueError("pruning needs the weights of a GGUF file unpacked: pass GgufConfig(dequantize=True)")
        kwargs["quantization_config"] = other or GgufConfig(dequantize=True)
    elif other is not None:
        raise ValueError(
            f"sparsity_config and {type(other).__name__} do not go together: quantized weights cannot be pruned"
        )
    elif recorded is None:
        kwargs["quantization_config"] = config
    source.check_index()
    return recorded


def _check_one_process(kwargs: dict[str, Any]) -> None:
    name = next((name for name in _PARALLEL_ARGUMENTS if kwargs.get(name) is not None), None)
    if is_deepspeed_zero3_enabled() or is_fsdp_enabled():
        name = "DeepSpeed ZeRO-3 or FSDP"
    if name is not None:
        raise ValueError(
            f"{name} and sparsity_config do not go together: prune in one process, save, then load the result"
        )


def _recorded_config(source: Source) -> SparsityConfig | None:
    """The settings with which a checkpoint was pruned; None for one that is not sparse."""
    config = source.arguments.get("config")
    if isinstance(config, PreTrainedConfig):
        settings = getattr(config, "quantization_config", None) or getattr(config, DENSE_CONFIG_KEY, None)
    elif source.arguments.get("gguf_file") is not None or (source.name is None and config is None):
        return None
    else:
        values, _ = PreTrainedConfig.get_config_dict(source.name if config is None else config, **source.hub)
        settings = recorded_settings(values)
    if settings is None or isinstance(settings, SparsityConfig) or is_dense_record(settings):
        return None if is_dense_record(settings) else settings
    if not is_our_record(settings):
        method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
        raise ValueError(
            f"the checkpoint is quantized ({method}), and quantized weights cannot be pruned: "
            "prune the model that it was made from"
        )
    return SparsityConfig.from_dict(settings)


def _check_agreement(config: SparsityConfig, recorded: SparsityConfig) -> None:
    """Raises ValueError where settings passed for a sparse checkpoint are not the ones with which it was pruned. Those
    that were not passed agree."""
    passed, found = config.to_dict(), recorded.to_dict()
    differences = []
    for name in {*config.given, *config.method_settings} - {*RUN_TIME_SETTINGS, "tokenizer", "method_settings"}:
        same = passed[name] == found.get(name)
        if name == "pattern" and None not in (passed[name], found[name]):
            same = Pattern(passed[name]) == Pattern(found[name])
        if not same:
            differences.append(f"{name}: passed {passed[name]!r}, recorded {found.get(name)!r}")
    if differences:
        raise ValueError(
            "the checkpoint is sparse already, with other settings ("
            + "; ".join(sorted(differences))
            + "): load it without a sparsity_config, or prune the dense model that it was made from"
        )


def _finish(model: PreTrainedModel, config: SparsityConfig | None, source: Source) -> bool:
    """Finishes the loading of a sparse checkpoint, and reads what lies beside its weights; False for any other."""
    settings: Any = [getattr(model.config, key, None) for key in ("quantization_config", DENSE_CONFIG_KEY)]
    recorded = next(filter(is_our_record, settings), None)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer.quantization_config, SparsityConfig):
        recorded = None  # whoever has quantized it loads and saves it
    if recorded is None or not dict(recorded).get("layers"):
        drop_record(model.config)
        _check_not_lost(model, source)
        return False
    source.check_loaded(model)
    check_finite(model)
    error = _make_sparse(model, recorded, source)
    if error is not None and config is not None:
        raise ValueError(f"the checkpoint says that it is sparse, but {error}")
    if error is not None:
        logger.warning(f"The checkpoint says that it is sparse, but {error}; it is loaded as a dense model.")
        return False
    if config is not None:
        for name in RUN_TIME_SETTINGS:
            setattr(model.config.quantization_config, name, getattr(config, name))
    _read_records(model, source)
    return True


def _make_sparse(model: PreTrainedModel, recorded: Any, source: Source) -> str | None:
    """Checks the masks of the sparse modules of a loaded model, or makes some of the weights of a dense-stored one.
    What the config says of weights that are not sparse is dropped from it; then this gives the reason."""
    modules = sparse_modules(model)
    for name, module in modules.items():
        if not module.weight_mask.is_meta:
            module.check_mask(name)
    if modules:
        forget_conversions(model)
        return None
    drop_record(model.config)
    if isinstance(recorded, SparsityConfig):
        quantizer: Any = model.hf_quantizer
        quantizer.remove_quantization_config(model)
        return "its weight files hold dense weights alone"
    source.check_index()
    recorded = SparsityConfig.from_dict(recorded)
    try:
        sparsify_dense(model, recorded.layers or {})
    except ValueError as error:
        return str(error)
    attach(model, recorded)
    return None


def _read_records(model: PreTrainedModel, source: Source) -> None:
    """Puts what lies beside the weights into the model's facts."""
    facts = facts_of(model)
    kinds: dict[str, tuple[str, Any]] = {
        "report": (REPORT_NAME, SparsityReport),
        "merge": (MERGE_REPORT_NAME, MergeReport),
        "results": (RESULTS_NAME, EvaluationResults),
    }
    for attribute, (name, kind) in kinds.items():
        path = source.file(name)
        try:
            setattr(facts, attribute, None if path is None else kind.load(path))
        except ValueError as error:
            logger.warning(f"The model has no {name}: {error}")
    if facts.report is not None and facts.merge is not None and not facts.report.changes:
        facts.report.changes.append(facts.merge.change())  # merged by a version that did not note it
    mark_weights(model, None if facts.report is None else facts.report.fingerprint)
    tag_model(model, facts.report, made_with(model))


def _check_not_lost(model: PreTrainedModel, source: Source) -> None:
    """Raises ValueError where a sparse checkpoint was loaded as a model without sparse modules, as the text model of a
    multimodal one is: its packed weights were passed over and random ones are in their places. Nothing is looked up
    for a model whose weights were all there, but those of a new head."""
    prefix = model.base_model_prefix
    lost = [name for name in random_weights(model) if model.base_model is model or name.startswith(f"{prefix}.")]
    if not lost or source.arguments.get("gguf_file") is not None:
        return
    path = source.file(CONFIG_NAME)  # a folder may have none, where the config was passed
    if path is not None and is_our_record(json.loads(Path(path).read_text("utf-8")).get("quantization_config")):
        raise ValueError(
            f"{len(lost)} weights of this sparse checkpoint were passed over and would be random: load it with the "
            "class that it was saved from"
        )
