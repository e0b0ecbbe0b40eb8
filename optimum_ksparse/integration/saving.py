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
from ..checkpoint.bitmask import foreign_record
from ..checkpoint.staging import drop_records, staged
from ..config import DENSE_CONFIG_KEY, RECORDED, RUN_TIME_SETTINGS, SparsityConfig, recorded_settings
from ..evaluation import settled_records
from ..records import COMPRESSED_TENSORS

logger = logging.get_logger(__name__)

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def save_pretrained(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps `save_pretrained` of models; a model that is, and always was, dense is saved as before. With
    `overwrite=True` a model that was pruned may take the place of the one that it was loaded from."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def wrapper(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        config, is_sparse = made_with(self), bool(sparse_modules(self))
        bound = signature.bind(self, *args, **kwargs).arguments
        adapted = getattr(self, "_hf_peft_config_loaded", False)  # then transformers saves the adapter alone
        is_ours = is_sparse or (getattr(vars(self).get("ksparse"), "is_dequantized", False) and not adapted)
        if is_sparse and bound.get("distributed_checkpoint"):
            raise ValueError(
                "a sparse model that is spread over processes is saved whole, by the first of them: leave "
                "distributed_checkpoint out"
            )
        is_main_process = self.should_save_on_this_rank(bound.get("is_main_process", True))
        if not is_ours or not is_main_process:
            with nullcontext() if is_sparse or adapted else without_record(self.config):
                original(self, *args, **kwargs)
            if not is_ours and not adapted and is_main_process:
                drop_records(bound["save_directory"])
            return
        if config is None and is_sparse:
            raise ValueError(
                "the model holds sparse modules that sparsify() did not make; nothing could load them again"
            )
        directory, others = bound["save_directory"], bound.pop("kwargs", {})
        if not others.pop("overwrite", False):
            _check_place(self, config, directory, adapted)
        _tell_tokenizer(self, Path(directory))
        # The repository is named after the folder, as transformers does; what is no argument is one for the Hub.
        hub: dict[str, Any] = {name: bound[name] for name in ("token", "max_shard_size", "variant") if name in bound}
        hub |= {"repo_id": os.path.basename(os.path.normpath(directory)), **others}
        pushes = bound.pop("push_to_hub", False)
        _save(original, bound, config, adapted)
        if pushes:
            self.push_to_hub(**hub)

    return wrapper


def _save(
    original: Callable[..., None], arguments: dict[str, Any], config: SparsityConfig | None, adapted: bool
) -> None:
    """Saves a model of ours by `original` with its `arguments`, the model among them, and its records with it."""
    model, state_dict = arguments["self"], arguments.get("state_dict")
    is_sparse = config is not None and bool(sparse_modules(model))
    if config is not None and is_sparse and config.storage == "packed":
        arguments["save_original_format"] = False  # conversions are for dense tensors
    if state_dict is not None:
        arguments["state_dict"] = dict(state_dict)  # transformers takes out what it has written
    with staged(arguments["save_directory"]) as staging, ExitStack() as as_stored:
        if config is None:
            as_stored.enter_context(without_record(model.config))
        elif is_sparse:
            record_layers(model, config)
            as_stored.enter_context(_given_state_dict(model, config, arguments.get("state_dict")))
            as_stored.enter_context(_config_for_storage(model, config))
        original(**{**arguments, "save_directory": staging})
        if config is not None and is_sparse and not adapted and not is_elsewhere(model):
            check_saved(model, staging, config.storage)
        if config is not None and is_sparse and not adapted and config.storage == "packed":
            guard_packed(staging, model.config)
        if adapted:
            record(model, staging)
        for entry in settled_records(model, state_dict):
            if entry is not None:
                entry.save(staging)


def _check_place(
    model: PreTrainedModel, config: SparsityConfig | None, directory: str | os.PathLike[str], adapted: bool
) -> None:
    """Raises FileExistsError where saving a model, or its adapter alone, into `directory` would lose what lies there:
    what the model was made from, or an adapter, which beside a model would be loaded on top of it."""
    what = "the model that this one was made from" if _is_source(model, config, directory) else None
    if not adapted and (Path(directory) / ADAPTER_CONFIG_NAME).is_file():
        what = what or "an adapter"
    if what is not None:
        raise FileExistsError(
            f"save_directory={os.fspath(directory)!r} holds {what}, which would be lost: save into another folder, "
            "or pass overwrite=True"
        )


def _is_source(model: PreTrainedModel, config: SparsityConfig | None, directory: str | os.PathLike[str]) -> bool:
    """Whether the model was loaded from `directory` and made of what lies there: the weights that were pruned, or,
    without `config`, those of a sparse model that is dense now. A sparse model that was loaded from there and trained
    may take its own place."""
    source = facts_of(model).folder or model.name_or_path
    if not source or not Path(source).is_dir() or not (Path(directory) / CONFIG_NAME).is_file():
        return False
    if not os.path.samefile(source, directory):
        return False
    recorded = recorded_settings(PreTrainedConfig.get_config_dict(directory)[0])
    if config is None or not is_our_record(recorded):
        return True
    there, here = SparsityConfig.from_dict(dict(recorded or {})).to_dict(), json.loads(json.dumps(config.to_dict()))
    compared = set(there) - {*RUN_TIME_SETTINGS, *RECORDED, "tokenizer"}
    return any(there[name] != here.get(name) for name in compared)


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
    present: Any = getattr(model, "hf_quantizer", None)
    if present is None:  # a part of a sparse model, such as its decoder
        model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    quantizer: Any = model.hf_quantizer
    quantizer.state_dict = state_dict
    try:
        yield
    finally:
        quantizer.state_dict = None
        if present is None:
            del model.hf_quantizer


@contextmanager
def _config_for_storage(model: PreTrainedModel, config: SparsityConfig) -> Iterator[None]:
    """Storage for others to read: the settings go under a key of our own, and no `quantization_config` asks for this
    plugin."""
    if config.storage == "packed":
        yield
        return
    if config.storage == COMPRESSED_TENSORS:
        model.config.quantization_config = foreign_record(model)
    else:
        del model.config.quantization_config
    # Its values are in the dtype of the weights, whatever they are integers times.
    settings = {name: value for name, value in config.to_dict().items() if name not in config.quantisation}
    setattr(model.config, DENSE_CONFIG_KEY, {**settings, "names": None})
    try:
        with dense_shapes(model):
            yield
    finally:
        delattr(model.config, DENSE_CONFIG_KEY)
        model.config.quantization_config = config
