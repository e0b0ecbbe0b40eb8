"""The wrapper of `save_pretrained`: a sparse model is written whole or not at all, with its report."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, logging

from ..adapters import MergeReport
from ..adapters.masks import record
from ..checkpoint import (
    check_saved,
    dense_shapes,
    facts_of,
    guard_packed,
    is_elsewhere,
    is_our_record,
    made_with,
    record_layers,
    sparse_modules,
    without_record,
)
from ..checkpoint.staging import drop_records, staged
from ..config import DENSE_CONFIG_KEY, RECORDED, RUN_TIME_SETTINGS, SparsityConfig
from ..evaluation import EvaluationResults, settled_records
from ..report import SparsityReport

logger = logging.get_logger(__name__)

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def save_pretrained(original: Callable[..., None]) -> Callable[..., None]:
    """Of `save_pretrained` of models; models that are and were dense pass through. With
    `overwrite=True` a model that was pruned may take the place of the one that it was loaded from."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def wrapper(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        config, is_sparse = made_with(self), bool(sparse_modules(self))
        bound = signature.bind(self, *args, **kwargs).arguments
        adapted = getattr(self, "_hf_peft_config_loaded", False)  # then transformers saves the adapter alone
        is_ours = is_sparse or (getattr(vars(self).get("ksparse"), "is_dequantized", False) and not adapted)
        if not is_ours or not bound.get("is_main_process", True):
            with nullcontext() if is_sparse or adapted else without_record(self.config):
                original(self, *args, **kwargs)
            if not is_ours and not adapted and bound.get("is_main_process", True):
                drop_records(bound["save_directory"])
            return
        if config is None and is_sparse:
            raise ValueError(
                "the model holds sparse modules that sparsify() did not make; nothing could load them again"
            )
        directory = bound["save_directory"]
        if not bound.get("kwargs", {}).pop("overwrite", False):
            _check_source(self, config, directory)
            if not adapted:
                _check_no_adapter(directory)
        _tell_tokenizer(self, Path(directory))
        known = {name: value for name, value in bound.items() if name not in ("self", "push_to_hub", "kwargs")}
        if config is not None and is_sparse and config.storage == "packed":
            known["save_original_format"] = False  # conversions are for dense tensors
        state_dict = bound.get("state_dict")
        if state_dict is not None:
            known["state_dict"] = dict(state_dict)  # transformers takes out what it has written
        with staged(directory) as staging, ExitStack() as as_stored:
            if config is None:
                as_stored.enter_context(without_record(self.config))
            elif is_sparse:
                record_layers(self, config)
                as_stored.enter_context(_given_state_dict(self, config, known.get("state_dict")))
                as_stored.enter_context(_config_for_storage(self, config))
            original(self, **{**known, "save_directory": staging})
            if config is not None and is_sparse and not adapted and not is_elsewhere(self):
                check_saved(self, staging, config.storage == "packed")
            if config is not None and is_sparse and not adapted and config.storage == "packed":
                guard_packed(Path(staging))
            if adapted:
                record(self, staging)
            for found in settled_records(self, state_dict):
                if isinstance(found, SparsityReport | MergeReport | EvaluationResults):
                    found.save(staging)
        if bound.get("push_to_hub"):
            # What is left are arguments for the Hub; the repository is named after the folder, as transformers does.
            hub: dict[str, Any] = {
                name: bound[name] for name in ("token", "max_shard_size", "variant") if name in bound
            }
            hub["repo_id"] = os.path.basename(os.path.normpath(directory))
            self.push_to_hub(**{**hub, **bound.get("kwargs", {})})

    return wrapper


def _check_source(model: PreTrainedModel, config: SparsityConfig | None, directory: str | os.PathLike[str]) -> None:
    """Raises FileExistsError where the model was loaded from `directory` and made of what lies there: the weights that
    were pruned, or, with no `config`, those of a sparse model that is dense now. A sparse model that was loaded from
    there and trained may take its own place."""
    source = facts_of(model).folder or model.name_or_path
    if not source or not Path(source).is_dir() or not (Path(directory) / CONFIG_NAME).is_file():
        return
    if not os.path.samefile(source, directory):
        return
    values, _ = PreTrainedConfig.get_config_dict(directory)
    recorded = values.get("quantization_config") or values.get(DENSE_CONFIG_KEY)
    if config is not None and is_our_record(recorded):
        there = SparsityConfig.from_dict(dict(recorded or {})).to_dict()
        compared = set(there) - {*RUN_TIME_SETTINGS, *RECORDED, "tokenizer"}
        ours = json.loads(json.dumps(config.to_dict()))
        if all(there[name] == ours.get(name) for name in compared):
            return
    raise FileExistsError(
        f"save_directory={os.fspath(directory)!r} holds the model that this one was made from, which would be lost: "
        "save into another folder, or pass overwrite=True"
    )


def _check_no_adapter(directory: str | os.PathLike[str]) -> None:
    """Raises FileExistsError where there is an adapter in `directory`: beside a model it would be loaded on top of it,
    and goes."""
    if (Path(directory) / ADAPTER_CONFIG_NAME).is_file():
        raise FileExistsError(
            f"save_directory={os.fspath(directory)!r} holds an adapter, which would be lost: save into another "
            "folder, or pass overwrite=True"
        )


def _tell_tokenizer(model: PreTrainedModel, directory: Path) -> None:
    """Says once that a model which was pruned here is saved without a tokenizer. `Trainer` saves its own."""
    facts = facts_of(model)
    if (
        getattr(facts.mark, "pruned_here", False)
        and facts.run is None
        and not any((directory / name).is_file() for name in _TOKENIZER_FILES)
    ):
        logger.warning_once(
            "There is no tokenizer where the model is saved: save it there too (tokenizer.save_pretrained), because "
            "`eval`, `push_to_hub` and whoever loads the model need it."
        )


@contextmanager
def _given_state_dict(model: PreTrainedModel, config: SparsityConfig, state_dict: Any) -> Iterator[None]:
    own: Any = getattr(model, "hf_quantizer", None)
    if own is None:  # a part of a sparse model, such as its decoder
        model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    quantizer: Any = model.hf_quantizer
    quantizer.state_dict = state_dict
    try:
        yield
    finally:
        quantizer.state_dict = None
        if own is None:
            del model.hf_quantizer


@contextmanager
def _config_for_storage(model: PreTrainedModel, config: SparsityConfig) -> Iterator[None]:
    """Dense storage: the settings go under a key of our own, and no `quantization_config` asks for this plugin."""
    if config.storage != "dense":
        yield
        return
    del model.config.quantization_config
    setattr(model.config, DENSE_CONFIG_KEY, {**config.to_dict(), "names": None})
    try:
        with dense_shapes(model):
            yield
    finally:
        delattr(model.config, DENSE_CONFIG_KEY)
        model.config.quantization_config = config
