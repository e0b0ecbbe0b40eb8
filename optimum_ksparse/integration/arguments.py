"""What `from_pretrained` was passed for this package: settings and how to run, checked before anything is loaded."""

from __future__ import annotations

from typing import Any

from transformers import GgufConfig, PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

from ..checkpoint import is_dense_record, is_our_record
from ..checks import check_keys
from ..config import DENSE_CONFIG_KEY, FLAT_SETTINGS, RUN_TIME_SETTINGS, SparsityConfig, recorded_settings
from ..pattern import Pattern
from ..records import sparse_format
from ..runtime import RuntimeConfig
from .source import Source, recover_source

_PARALLEL_ARGUMENTS = ("tp_plan", "tp_size", "distributed_config", "device_mesh")


def take_config(kwargs: dict[str, Any]) -> SparsityConfig | None:
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


def take_runtime(kwargs: dict[str, Any]) -> RuntimeConfig | None:
    """Takes the `RuntimeConfig` out of the arguments, or makes one of its settings; None where there is none."""
    runtime = kwargs.pop("runtime_config", None)
    if isinstance(runtime, dict):
        return RuntimeConfig(**runtime)
    if runtime is not None and not isinstance(runtime, RuntimeConfig):
        raise TypeError(f"runtime_config must be a RuntimeConfig, found {type(runtime).__name__}")
    return runtime


def prepare(config: SparsityConfig, source: Source, kwargs: dict[str, Any]) -> SparsityConfig | None:
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
        settings: Any = getattr(config, "quantization_config", None) or getattr(config, DENSE_CONFIG_KEY, None)
        settings = settings if sparse_format(settings) is None else recorded_settings(vars(config))
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
    passed, saved = config.to_dict(), recorded.to_dict()
    differences = []
    for name in {*config.given, *config.method_settings} - {*RUN_TIME_SETTINGS, "tokenizer", "method_settings"}:
        same = passed.get(name) == saved.get(name)
        if name == "pattern" and None not in (passed[name], saved[name]):
            same = Pattern(passed[name]) == Pattern(saved[name])
        if not same:
            differences.append(f"{name}: passed {passed.get(name)!r}, recorded {saved.get(name)!r}")
    if differences:
        raise ValueError(
            "the checkpoint is sparse already, with other settings ("
            + "; ".join(sorted(differences))
            + "): load it without a sparsity_config, or prune the dense model that it was made from; "
            "`optimum-cli ksparse quantize` quantises its values"
        )
