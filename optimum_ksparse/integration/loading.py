"""`from_pretrained`: prunes while loading, and finishes the loading of checkpoints that are sparse already."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, logging

from ..adapters import MergeReport
from ..checkpoint import (
    check_finite,
    drop_guard,
    drop_record,
    facts_of,
    forget_conversions,
    is_offloaded,
    is_our_record,
    made_with,
    random_weights,
    sparse_experts,
    sparse_layers,
    sparse_modules,
    sparsify_dense,
)
from ..checkpoint.bitmask import take_pattern
from ..config import DENSE_CONFIG_KEY, RUN_TIME_SETTINGS, ForeignConfig, SparsityConfig
from ..evaluation import EvaluationResults, mark_weights
from ..hub import card_of_source, tag_model
from ..pruners.existing import commonest
from ..pruning.model import attach, note_values, report_of
from ..records import MERGE_REPORT_NAME, REPORT_NAME, RESULTS_NAME
from ..report import SparsityReport
from ..runtime import configure
from .arguments import prepare, take_config, take_runtime
from .source import Source, loading_from

logger = logging.get_logger(__name__)


def from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `from_pretrained` of models: passes `sparsity_config` on as a `quantization_config`, by which the
    quantizer prunes, and finishes the loading of sparse checkpoints. Any other model is returned as it is; where it
    came from is noted outside of it."""

    @functools.wraps(original)
    def wrapper(cls: type[PreTrainedModel], name: Any = None, *args: Any, **kwargs: Any) -> Any:
        name = kwargs.pop("pretrained_model_name_or_path", name)
        config, runtime = take_config(kwargs), take_runtime(kwargs)
        if isinstance(kwargs.get("config"), PreTrainedConfig):  # it may have been read before this package was there
            drop_guard(vars(kwargs["config"]))
        source = Source.read(name, kwargs)
        recorded = None if config is None else prepare(config, source, kwargs)
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

    return wrapper


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
    is_packed_now = getattr(facts_of(model).mark, "pruned_here", False)  # the quantizer has found zeros in it
    if not is_packed_now:
        source.check_loaded(model)
        check_finite(model)
    error = None if is_packed_now else _make_sparse(model, recorded, source)
    if error is not None and config is not None:
        raise ValueError(f"the checkpoint says that it is sparse, but {error}")
    if error is not None:
        logger.warning(f"The checkpoint says that it is sparse, but {error}; it is loaded as a dense model.")
        return False
    if config is not None:
        for name in RUN_TIME_SETTINGS:
            setattr(model.config.quantization_config, name, getattr(config, name))
    if is_packed_now:
        return True
    _read_records(model, source)
    facts = facts_of(model)
    if facts.report is None and isinstance(recorded, ForeignConfig):
        facts.report = report_of(model, model.config.quantization_config)
        facts.report.base_card = card_of_source(model)
        tag_model(model, facts.report, made_with(model))
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
        if isinstance(recorded, ForeignConfig):
            for layer in sparse_layers(model).values() if not is_offloaded(model) else ():
                take_pattern(layer)
            attach(model, _own_config(model, recorded))
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


def _own_config(model: PreTrainedModel, foreign: ForeignConfig) -> SparsityConfig:
    """The settings of a model that was read from the files of compressed-tensors: those that this package wrote beside
    them, otherwise those of a model that was pruned elsewhere."""
    ours: Any = getattr(model.config, DENSE_CONFIG_KEY, None)
    if is_our_record(ours):
        delattr(model.config, DENSE_CONFIG_KEY)
        return SparsityConfig.from_dict(dict(ours))
    config = SparsityConfig(foreign.method, storage=foreign.storage)
    return config.changed(pattern=commonest(str(layer.pattern) for layer in sparse_layers(model).values()))


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
            logger.warning(f"The model is loaded without its {name}: {error}")
    if facts.report is not None and facts.merge is not None and not facts.report.changes:
        facts.report.changes.append(facts.merge.change())  # merged by a version that did not note it
    note_values(model)
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
