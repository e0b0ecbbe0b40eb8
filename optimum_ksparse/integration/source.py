"""Where `from_pretrained` reads a model: for what lies beside its weights, and for pruning it when it is there."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import hub

from ..api import sparsify
from ..blocks import find_blocks
from ..checkpoint import check_index, check_loaded, drop_guard, note_origin, random_weights
from ..checkpoint.staging import recover
from ..config import SparsityConfig
from ..data import load_tokenizer
from ..data.reaching import HUB_ARGUMENTS, find_file, hub_arguments
from ..hub import card_of_source

_resolve_revision = getattr(hub, "resolve_revision", None)


@dataclass(frozen=True)
class Source:
    """What `from_pretrained` was told: folder or Hub id, and its keyword arguments."""

    name: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, name: Any, arguments: dict[str, Any]) -> Source:
        """`arguments` then have the commit that `revision` stands for now, so that all is read from that one.
        transformers would ask for it next, and does not keep it; versions that do not ask keep it in the config."""
        source = cls(name, arguments)
        if _resolve_revision is not None and isinstance(name, str) and not source.is_folder:
            places = ("token", "local_files_only", "cache_dir")
            place = {key: arguments[key] for key in places if arguments.get(key) is not None}
            revision = _resolve_revision(name, arguments.get("revision"), **place)
            if revision is not None:
                arguments["revision"] = revision
        return cls(name, dict(arguments))

    @property
    def hub(self) -> dict[str, Any]:
        """Arguments that say where on the Hub the files are that have just been read."""
        return {name: value for name, value in hub_arguments(self.arguments).items() if name != "force_download"}

    @property
    def is_folder(self) -> bool:
        return isinstance(self.name, str | os.PathLike) and os.path.isdir(self.name)

    def file(self, name: str) -> str | None:
        """Path of a file beside the weights; None where there is none."""
        return None if self.name is None else find_file(self.name, name, **self.hub)

    def check_index(self) -> None:
        """Raises ValueError where the weight files of a folder lie elsewhere; the Hub's client has checks of its
        own."""
        if self.is_folder and self.arguments.get("gguf_file") is None:
            check_index(self.name, self.arguments.get("variant"), **self.hub)

    def note(self, model: PreTrainedModel) -> None:
        """Lets `facts_of(model)` say where it came from."""
        commit, config = getattr(self.arguments.get("revision"), "resolved", None), self.arguments.get("config")
        if not isinstance(config, PreTrainedConfig) or config.name_or_path == self.name:
            commit = commit or getattr(model.config, "_commit_hash", None)
        note_origin(model, self.name, self.arguments.get("subfolder") or "", commit)

    def check_loaded(self, model: PreTrainedModel) -> None:
        """Raises ValueError where weights of the model are random that should have been read."""
        new_head = bool(self.arguments.get("ignore_mismatched_sizes"))
        check_loaded(find_blocks(model), random_weights(model), new_head=new_head)

    def prune(self, model: PreTrainedModel, config: SparsityConfig) -> None:
        """Prunes a model that has just been loaded, on text of its own tokenizer."""
        self.check_loaded(model)
        self.note(model)
        names = ("trust_remote_code", "gguf_file", *HUB_ARGUMENTS)
        arguments = {name: self.arguments[name] for name in names if self.arguments.get(name) is not None}
        tokenizer = None
        if config.needs_data:
            tokenizer = load_tokenizer(config.calibration, self.name or model.name_or_path, **arguments)
        report = sparsify(model, config, tokenizer)
        if "token" in arguments and not report.base_card:  # of a repository that asks for it
            report.base_card = card_of_source(model, arguments["token"])
        report.base_arguments = {name: arguments[name] for name in ("gguf_file", "subfolder") if name in arguments}


_current: ContextVar[Source] = ContextVar("source")


def current_source() -> Source:
    """The source of the model that is being loaded, which the hooks of a quantizer are not told."""
    return _current.get(Source())


@contextmanager
def loading_from(source: Source) -> Iterator[None]:
    """Within it a model is loaded from `source`."""
    token = _current.set(source)
    try:
        yield
    finally:
        _current.reset(token)


def recover_source(source: Any, subfolder: str | None = None) -> None:
    """Puts right what a save that was cut off has left in a folder that `from_pretrained` is asked to read."""
    if isinstance(source, str | os.PathLike) and os.path.isdir(source):
        recover(os.path.join(source, subfolder or ""))


def reading(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a class method that reads a folder (of configs, tokenizers, adapters): calls `recover_source` first."""

    @functools.wraps(original)
    def read(cls: type, source: Any = None, *args: Any, **kwargs: Any) -> Any:
        source = kwargs.pop("pretrained_model_name_or_path", source)
        recover_source(source, kwargs.get("subfolder"))
        return original(cls, source, *args, **kwargs)

    return read


def reading_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `PreTrainedConfig.get_config_dict`, by which all configs are read: takes `guard_packed` out of them."""
    read = reading(original)

    @functools.wraps(original)
    def read_config(cls: type, source: Any = None, *args: Any, **kwargs: Any) -> Any:
        settings, unused = read(cls, source, *args, **kwargs)
        drop_guard(settings)
        return settings, unused

    return read_config
