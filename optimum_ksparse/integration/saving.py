"""The wrapper of `save_pretrained`: a sparse model is written whole or not at all, with its report."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from ..checkpoint import layer_records, sparse_modules, staged
from ..config import DENSE_CONFIG_KEY, SparsityConfig
from ..report import SparsityReport



def wrap_save_pretrained(cls: type[PreTrainedModel]) -> None:
    """Wraps `cls.save_pretrained` once; models without sparse layers pass through."""
    original = cls.save_pretrained
    if getattr(original, "_ksparse", False):
        return

    @functools.wraps(original)
    def save_pretrained(
        self: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        config = getattr(self.config, "quantization_config", None)
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        if not isinstance(config, SparsityConfig) or not sparse_modules(self) or not is_main_process:
            return original(self, save_directory, *args, push_to_hub=push_to_hub, **kwargs)
        if os.path.isfile(save_directory):
            raise NotADirectoryError(f"save_directory={os.fspath(save_directory)!r} is a file; pass a folder")
        hub = {key: kwargs.pop(key) for key in _HUB_ARGUMENTS if push_to_hub and key in kwargs}
        config.layers = layer_records(self)
        with staged(save_directory) as staging, _config_for_storage(self, config):
            original(self, staging, *args, **kwargs)
            report = getattr(self, "sparsity_report", None)
            if isinstance(report, SparsityReport):
                report.save(staging)
        if push_to_hub:
            repo_id = hub.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
            self.push_to_hub(repo_id, **hub)
        return None

    save_pretrained._ksparse = True  # type: ignore[attr-defined]
    cls.save_pretrained = save_pretrained  # type: ignore[method-assign]


_HUB_ARGUMENTS = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


@contextmanager
def _config_for_storage(model: PreTrainedModel, config: SparsityConfig) -> Iterator[None]:
    """Dense storage: the settings go under a key of our own, and no `quantization_config` asks for this plugin."""
    if config.storage != "dense":
        yield
        return
    del model.config.quantization_config
    setattr(model.config, DENSE_CONFIG_KEY, config.to_dict())
    try:
        yield
    finally:
        delattr(model.config, DENSE_CONFIG_KEY)
        model.config.quantization_config = config
