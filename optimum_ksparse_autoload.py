"""Sparse checkpoints load in a process that never imports `optimum_ksparse`: it is imported for the first of them.

torch calls `install`, an entry point of its group `torch.backends`, at the end of `import torch`. Nothing is imported
then: it waits for the two modules of transformers through which every model is loaded. The module stands beside the
package, because whatever is in the package imports the package first.

`KSPARSE_AUTOLOAD=0` turns it off, and so does torch's own `TORCH_DEVICE_BACKEND_AUTOLOAD=0`.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "optimum_ksparse"
QUANT_METHOD, COMPRESSED_TENSORS = "optimum-ksparse", "compressed-tensors"
# Where `config.json` of a dense-stored sparse checkpoint keeps the settings. Under `sparsity_config` the Auto classes
# would choke on the keyword argument of that name.
DENSE_CONFIG_KEY = "ksparse"
# How that begins which stands in the config of packed weights for the name of their file: it stops any transformers
# that reads it.
GUARD = "packed sparse weights, for which you need"
_is_loading: ContextVar[bool] = ContextVar("is_loading", default=False)
_undo: list[Callable[[], object]] = []


def install() -> None:
    """What torch calls. An exception would stop `import torch`: there is nothing in it that could raise one."""
    if os.environ.get("KSPARSE_AUTOLOAD") == "0" or PACKAGE in sys.modules or _undo:
        return
    for name, act in (("transformers.quantizers.auto", _wait_for_config), ("transformers.modeling_utils", _wrap)):
        _undo.append(functools.partial(_forget, when_imported(name, act)))


def withdraw() -> None:
    """Takes all of it back. The package calls this when it is imported: it does the same itself, and more."""
    while _undo:
        _undo.pop()()


def describe() -> str:
    """Whether sparse checkpoints load without an import where this is installed, in a sentence."""
    from importlib.metadata import entry_points

    for name, is_off in (("KSPARSE_AUTOLOAD", "0".__eq__), ("TORCH_DEVICE_BACKEND_AUTOLOAD", "1".__ne__)):
        if is_off(value := os.environ.get(name, "1")):
            return f"sparse checkpoints load after `import {PACKAGE}` alone, because {name}={value}"
    if not any(entry.value.startswith(__name__) for entry in entry_points(group="torch.backends")):
        return f"sparse checkpoints load after `import {PACKAGE}` alone, because {QUANT_METHOD} is not installed"
    return "sparse checkpoints load without an import"


def when_imported(name: str, act: Callable[[ModuleType], object]) -> MetaPathFinder | None:
    """Calls `act` with a module: now if it is there, else once somebody has imported it. Returns what waits for it."""
    if name in sys.modules:
        act(sys.modules[name])
        return None
    finder = _Waiting(name, act)
    sys.meta_path.insert(0, finder)
    return finder


class _Waiting(MetaPathFinder):
    """Finds a module as the other finders do, and acts when it has been executed. Looking for it is no import."""

    def __init__(self, name: str, act: Callable[[ModuleType], object]) -> None:
        self.name, self.act = name, act

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        others = [finder for finder in sys.meta_path if not isinstance(finder, _Waiting)]
        others = [finder for finder in others if hasattr(finder, "find_spec")]  # as Python asks
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                # Once: another finder may ask this one too, and the loader of a zip file is that of many modules.
                if module.__name__ == name and self in sys.meta_path:
                    _forget(self)
                    self.act(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _forget(finder: MetaPathFinder | None) -> None:
    if finder in sys.meta_path:
        sys.meta_path.remove(finder)


class _IsSparse(Exception):  # noqa: N818 (not an error)
    """Stops the loading of a checkpoint that turns out to be sparse."""


def _wait_for_config(module: ModuleType) -> None:
    """Puts stand-ins into transformers' table of quantization configs: for this package's own, and for those of
    compressed-tensors, of which it reads the sparse ones."""
    table = getattr(module, "AUTO_QUANTIZATION_CONFIG_MAPPING", None)
    if not isinstance(table, dict) or QUANT_METHOD in table:
        return
    for method in (QUANT_METHOD, COMPRESSED_TENSORS):
        theirs = table.get(method)
        table[method] = _stand_in(table, method, theirs)
        undo = functools.partial(table.pop, method)
        _undo.append(undo if theirs is None else functools.partial(table.__setitem__, method, theirs))


def _stand_in(table: dict[str, Any], method: str, theirs: Any) -> type:
    """Stands for a config class until a config turns up that this package reads."""

    def from_dict(cls: type, settings: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not _is_ours(settings):
            return theirs.from_dict(settings, *args, **kwargs)
        if _is_loading.get():
            raise _IsSparse
        import optimum_ksparse  # noqa: F401 (puts its own into the table)

        return table[method].from_dict(settings, *args, **kwargs)

    bases = () if theirs is None else (theirs,)
    return type("_Config" if theirs is None else theirs.__name__, bases, {"from_dict": classmethod(from_dict)})


def _wrap(module: ModuleType) -> None:
    """Wraps `PreTrainedModel.from_pretrained`: what is ours is loaded by the package, from the beginning. Any other
    model is loaded as if this were not here."""
    owner = getattr(module, "PreTrainedModel", None)
    method = vars(owner).get("from_pretrained") if owner is not None else None
    if owner is None or not isinstance(method, classmethod):
        return
    original = method.__func__
    is_inner = False

    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        if is_inner:
            return original(cls, *args, **kwargs)
        ours = "sparsity_config" in kwargs or "runtime_config" in kwargs or _is_sparse(kwargs.get("config"))
        ours = ours or not _undo  # withdrawn, it is called by whoever has kept it
        if not ours:
            token = _is_loading.set(True)
            try:
                loaded = original(cls, *args, **kwargs)
            except _IsSparse:
                ours = True
            except ValueError as error:  # a part of the config alone was read, as by the text model of another
                if GUARD not in str(error):
                    raise
                ours = True
            finally:
                _is_loading.reset(token)
        # A dense-stored one, which a class that reads the config itself has loaded as the dense model that it also is.
        if ours or _is_sparse(getattr(loaded[0] if isinstance(loaded, tuple) else loaded, "config", None)):
            import optimum_ksparse  # noqa: F401 (withdraws this wrapper and has its own)

            return vars(owner)["from_pretrained"].__func__(cls, *args, **kwargs)
        return loaded

    def undo() -> None:
        nonlocal is_inner
        is_inner = vars(owner)["from_pretrained"] is not wrapper  # somebody has wrapped it, and keeps calling it
        if not is_inner:
            owner.from_pretrained = method

    wrapper: Any = classmethod(from_pretrained)
    owner.from_pretrained = wrapper
    _undo.append(undo)


def _is_sparse(config: Any) -> bool:
    """Whether a model's config is that of a checkpoint that this package reads, packed or dense."""
    stored_dense = isinstance(getattr(config, DENSE_CONFIG_KEY, None), dict)
    return stored_dense or _is_ours(getattr(config, "quantization_config", None))


def _is_ours(settings: Any) -> bool:
    """Whether a `quantization_config` is one that this package reads, or refuses with a reason."""
    if not isinstance(settings, dict):
        return False
    sparsity, method = settings.get("sparsity_config"), settings.get("quant_method")
    form = sparsity.get("format") if isinstance(sparsity, dict) else None
    is_dense = form is None or (form == "dense" and bool(settings.get("config_groups")))
    is_foreign = method == COMPRESSED_TENSORS and (not is_dense or settings.get("format") == "marlin-24")
    return method == QUANT_METHOD or is_foreign
