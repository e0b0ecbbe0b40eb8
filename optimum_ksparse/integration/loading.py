"""The wrapper of `from_pretrained`: prunes while loading, and finishes the loading of checkpoints that are sparse
already."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.utils import CONFIG_NAME, cached_file, logging

from ..adapters import MergeReport
from ..api import attach, sparsify
from ..blocks import find_blocks
from ..checkpoint import (
    check_finite,
    check_index,
    check_loaded,
    commit_of,
    drop_record,
    facts_of,
    forget_conversions,
    is_dense_record,
    is_our_record,
    made_with,
    sparse_experts,
    sparse_modules,
    sparsify_dense,
)
from ..checks import check_keys
from ..config import (
    DENSE_CONFIG_KEY,
    FLAT_SETTINGS,
    QUANT_METHOD,
    RUN_TIME_SETTINGS,
    SparsityConfig,
    recorded_settings,
)
from ..evaluation import RECORDS, EvaluationResults, mark_weights
from ..hub import card_of_source, tag_model
from ..pattern import Pattern
from ..pruning import load_tokenizer
from ..records import MERGE_REPORT_NAME, REPORT_NAME, RESULTS_NAME
from ..report import SparsityReport
from ..runtime import RuntimeConfig, configure, tell_cost_on_cpu
from .describing import describe_from_pretrained
from .recovering import recover_source

logger = logging.get_logger(__name__)

# Arguments that say where on the Hub something is read.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
_PARALLEL_ARGUMENTS = ("tp_plan", "tp_size", "distributed_config", "device_mesh")


def from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of `from_pretrained` of models; a `SparsityConfig` is taken from `sparsity_config`, which signature and
    docstring name, or from `quantization_config`."""

    @functools.wraps(original)
    def wrapper(cls: type[PreTrainedModel], source: Any = None, *args: Any, **kwargs: Any) -> Any:
        source = kwargs.pop("pretrained_model_name_or_path", source)
        recover_source(source, kwargs.get("subfolder"))
        config, runtime = _take_config(kwargs), _take_runtime(kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        recorded = None
        if config is not None:
            recorded = _recorded_config(cls, source, kwargs)
            if recorded is None:
                _check_arguments(kwargs)
            else:
                _check_agreement(config, recorded)
                _check_not_quantized(kwargs.get("quantization_config"))
        if config is not None or _is_sparse_folder(source, kwargs):
            _check_index(source, kwargs)
        model, info = original(cls, source, *args, output_loading_info=True, **kwargs)
        # transformers does not keep it, and reports and cards name what a model was made from.
        facts = facts_of(model)
        facts.commit = _commit(source, kwargs)
        if isinstance(source, str | os.PathLike) and os.path.isdir(source):
            facts.folder = os.path.realpath(os.path.join(source, kwargs.get("subfolder") or ""))
        if config is not None and recorded is None:
            check_loaded(find_blocks(model), info)
            names = ("trust_remote_code", "gguf_file", *_HUB_ARGUMENTS)
            arguments = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            tokenizer = load_tokenizer(config, source, **arguments)
            report = sparsify(model, config, tokenizer)
            if kwargs.get("token") is not None and not report.base_card:  # of a repository that asks for it
                report.base_card = card_of_source(model, kwargs["token"])
            report.base_arguments = {name: kwargs[name] for name in ("gguf_file", "subfolder") if kwargs.get(name)}
        else:
            _finish_sparse(model, info, config, source, kwargs)
        if runtime is not None:
            _configure(model, runtime)
        tell_cost_on_cpu(model)
        requested = kwargs.get("experts_implementation")
        if requested not in (None, "eager") and sparse_experts(model):
            logger.warning(f'Sparse experts run with experts_implementation="eager" only, not with {requested!r}.')
        return (model, info) if wants_info else model

    describe_from_pretrained(wrapper)
    return wrapper


def _take_config(kwargs: dict[str, Any]) -> SparsityConfig | None:
    """Takes the `SparsityConfig` out of the arguments; None where there is none."""
    found = [name for name in ("sparsity_config", "quantization_config") if _is_ours(name, kwargs.get(name))]
    if len(found) == 2:
        raise ValueError("sparsity_config and quantization_config both hold sparsity settings; pass one of them")
    if not found:
        kwargs.pop("sparsity_config", None)
        return None
    config = kwargs.pop(found[0])
    kwargs.pop("sparsity_config", None)
    if not isinstance(config, dict):
        return config
    settings = {name: value for name, value in config.items() if name != "quant_method"}
    check_keys(settings, FLAT_SETTINGS, found[0])
    return SparsityConfig.from_flat(**settings)


def _take_runtime(kwargs: dict[str, Any]) -> RuntimeConfig | None:
    """Takes the `RuntimeConfig` out of the arguments, or makes one of its settings; None where there is none."""
    runtime = kwargs.pop("runtime_config", None)
    if isinstance(runtime, dict):
        return RuntimeConfig(**runtime)
    if runtime is not None and not isinstance(runtime, RuntimeConfig):
        raise TypeError(f"runtime_config must be a RuntimeConfig, found {type(runtime).__name__}")
    return runtime


def _configure(model: PreTrainedModel, runtime: RuntimeConfig) -> None:
    """How sparse layers run. What has no room for it is a model all the same, which may have taken hours to prune."""
    try:
        configure(model, runtime)
    except (torch.OutOfMemoryError, MemoryError) as error:
        logger.warning(f"The model is loaded, but the memory does not suffice for all of {runtime}: {error}")


def _is_ours(name: str, value: Any) -> bool:
    if isinstance(value, SparsityConfig):
        return True
    if name == "sparsity_config" and value is not None and not isinstance(value, dict):
        raise TypeError(
            f"sparsity_config must be a SparsityConfig or a dict of its settings, found {type(value).__name__}"
        )
    return isinstance(value, dict) and (name == "sparsity_config" or value.get("quant_method") == QUANT_METHOD)


def _check_arguments(kwargs: dict[str, Any]) -> None:
    """Refuses, before anything is loaded, what cannot be pruned."""
    for name in _PARALLEL_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} and sparsity_config do not go together: prune in one process, save, then load the result"
            )
    if is_deepspeed_zero3_enabled() or is_fsdp_enabled():
        raise ValueError(
            "a model cannot be pruned while DeepSpeed ZeRO-3 or FSDP loads it: prune in one process, then load it"
        )
    other = kwargs.get("quantization_config")
    if isinstance(other, GgufConfig) or (other is None and kwargs.get("gguf_file") is not None):
        if other is not None and not other.dequantize:
            raise ValueError("pruning needs the weights of a GGUF file unpacked: pass GgufConfig(dequantize=True)")
        kwargs["quantization_config"] = other or GgufConfig(dequantize=True)
    else:
        _check_not_quantized(other)


def _check_not_quantized(other: Any) -> None:
    if other is not None:
        raise ValueError(
            f"sparsity_config and {type(other).__name__} do not go together: quantized weights cannot be pruned"
        )


def _recorded_config(cls: type[PreTrainedModel], source: Any, kwargs: dict[str, Any]) -> SparsityConfig | None:
    """The settings with which a checkpoint was pruned; None for one that is not sparse."""
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        settings = getattr(config, "quantization_config", None) or getattr(config, DENSE_CONFIG_KEY, None)
    elif kwargs.get("gguf_file") is not None or (source is None and config is None):
        return None
    else:
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        values, _ = PreTrainedConfig.get_config_dict(source if config is None else config, **hub)
        settings = recorded_settings(values)
    if is_dense_record(settings):
        return None
    if isinstance(settings, SparsityConfig) or settings is None:
        return settings
    if not isinstance(settings, dict):
        if not hasattr(settings, "to_dict"):
            raise ValueError(f"quantization_config of the checkpoint is {type(settings).__name__}, must be an object")
        settings = settings.to_dict()
    if settings.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"the checkpoint is quantized ({settings.get('quant_method')}), and quantized weights cannot be pruned: "
            "prune the model that it was made from"
        )
    return SparsityConfig.from_dict(settings)


def _is_sparse_folder(source: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a local folder's config says that its checkpoint is sparse; the client of the Hub has checks of its
    own."""
    if not isinstance(source, str | os.PathLike) or not os.path.isdir(source):
        return False
    try:
        text = Path(source, kwargs.get("subfolder") or "", CONFIG_NAME).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False  # transformers says what is wrong with it
    return QUANT_METHOD in text


def _check_index(source: Any, kwargs: dict[str, Any]) -> None:
    """Refuses weight files outside the checkpoint's folder before transformers reads them."""
    if isinstance(source, str | os.PathLike) and kwargs.get("gguf_file") is None:
        check_index(source, kwargs.get("variant"), **_hub(kwargs))


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


def _finish_sparse(
    model: PreTrainedModel, info: dict[str, Any], config: SparsityConfig | None, source: Any, kwargs: dict[str, Any]
) -> None:
    """Finishes the loading of a sparse checkpoint, if it is one, and reads its report."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer.quantization_config, SparsityConfig):
        drop_record(model.config)  # whoever has quantized it loads and saves it
        return
    if is_dense_record(getattr(model.config, DENSE_CONFIG_KEY, None)):
        drop_record(model.config)
    if not (sparse_modules(model) or _records_layers(model)):
        _check_not_lost(info, source, kwargs)
        return
    check_loaded(find_blocks(model), info)
    check_finite(model)
    error = _make_sparse(model)
    if error is not None and config is not None:
        raise ValueError(f"the checkpoint says that it is sparse, but {error}")
    if error is not None:
        logger.warning(f"The checkpoint says that it is sparse, but {error}; it is loaded as a dense model.")
        return
    if config is not None:
        for name in RUN_TIME_SETTINGS:
            setattr(model.config.quantization_config, name, getattr(config, name))
    kinds: dict[str, Any] = {
        REPORT_NAME: SparsityReport,
        MERGE_REPORT_NAME: MergeReport,
        RESULTS_NAME: EvaluationResults,
    }
    facts = facts_of(model)
    for attribute, (name, kind) in zip(RECORDS, kinds.items(), strict=True):
        setattr(facts, attribute, None)
        path = _file(source, name, kwargs)
        try:
            if path is not None:
                setattr(facts, attribute, kind.load(path))
        except ValueError as error:
            logger.warning(f"The model has no {name}: {error}")
    report, merge = facts.report, facts.merge
    if report is not None and merge is not None and not report.changes:
        report.changes.append(merge.change())  # merged by a version that did not note it
    mark_weights(model, None if report is None else report.fingerprint)
    tag_model(model, report, made_with(model))


def _records_layers(model: PreTrainedModel) -> bool:
    """Whether the config of a model says that layers of its checkpoint are sparse."""
    settings: Any = getattr(model.config, "quantization_config", None) or getattr(model.config, DENSE_CONFIG_KEY, None)
    return is_our_record(settings) and bool(dict(settings).get("layers"))


def _make_sparse(model: PreTrainedModel) -> str | None:
    """Checks the masks of the sparse modules of a loaded model, or makes some of the weights of a dense-stored one.
    What the config says of weights that are not sparse is dropped from it; then this gives the reason."""
    modules = sparse_modules(model)
    for name, module in modules.items():
        if not module.weight_mask.is_meta:
            module.check_mask(name)
    if modules:
        forget_conversions(model)
        return None
    settings = getattr(model.config, DENSE_CONFIG_KEY, None)
    drop_record(model.config)
    if settings is None:
        quantizer: Any = model.hf_quantizer
        quantizer.remove_quantization_config(model)
        return "its weight files hold dense weights alone"
    recorded = SparsityConfig.from_dict(settings)
    try:
        sparsify_dense(model, recorded.layers or {})
    except ValueError as error:
        return str(error)
    attach(model, recorded)
    return None


def _check_not_lost(info: dict[str, Any], source: Any, kwargs: dict[str, Any]) -> None:
    """Raises ValueError where a sparse checkpoint was loaded as a model without sparse modules, as the text model of a
    multimodal one is: its packed weights were passed over and random ones are in their places."""
    if not info["missing_keys"] or kwargs.get("gguf_file") is not None:
        return
    path = _file(source, CONFIG_NAME, kwargs)  # a folder may have none, where the config was passed
    settings = None if path is None else json.loads(Path(path).read_text(encoding="utf-8")).get("quantization_config")
    if isinstance(settings, dict) and settings.get("quant_method") == QUANT_METHOD:
        raise ValueError(
            f"{len(info['missing_keys'])} weights of this sparse checkpoint were passed over and would be random: "
            "load it with the class that it was saved from"
        )


def _file(source: Any, name: str, kwargs: dict[str, Any]) -> str | None:
    """Path of a file beside the weights; None where there is none."""
    if source is None:
        return None
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **_hub(kwargs))


def _commit(source: Any, kwargs: dict[str, Any]) -> str | None:
    if not isinstance(source, str | os.PathLike) or os.path.isdir(source):
        return None
    # What has just been loaded is in the cache.
    return commit_of(source, kwargs.get("gguf_file") or CONFIG_NAME, **{**_hub(kwargs), "local_files_only": True})


def _hub(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments that say where on the Hub the files are that have just been read."""
    return {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs and key != "force_download"}
