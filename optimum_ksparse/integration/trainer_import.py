"""Wraps `Trainer` when somebody imports it: that takes long, and most programs never do."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_MODULE = "transformers.trainer"


def watch_trainer() -> None:
    """Wraps `Trainer`, now or as soon as it is imported; a second call does nothing."""
    if _MODULE in sys.modules:
        _wrap(sys.modules[_MODULE])
    elif not any(isinstance(finder, _Importing) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Importing())


def _wrap(module: ModuleType) -> None:
    from .training import wrap_trainer  # it needs what importing `Trainer` brings

    wrap_trainer(module.Trainer)


class _Importing(MetaPathFinder):
    """Finds the module of `Trainer` as it would be found without this, and wraps the class once it is executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _wrap(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
