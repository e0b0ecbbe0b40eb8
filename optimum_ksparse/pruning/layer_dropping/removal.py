"""Taking blocks out of a model, so that it is what its own config describes: before anything is changed that config is
written, read and built on the meta device, with and without the blocks, and the two are compared."""

from __future__ import annotations

import copy
import inspect
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...blocks import DecoderBlocks
from .settings import smaller, why_not

# Where a module keeps the number of its block, which the key-value cache goes by.
_NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number")
_PLAIN = (bool, int, float, str, type(None))
_Change = tuple[str, str, Any]  # path of a module, attribute, value
_Modules = dict[str, nn.Module]


def check_drop(blocks: DecoderBlocks, number: int, left_dense: Sequence[str] | None = None) -> None:
    """Raises ValueError where `number` blocks of the model cannot be dropped, whichever they are, as far as can be
    told without knowing them; also where `left_dense`, the names in `modules_to_not_convert`, tell a block by its
    number, which another block may have then."""
    numbered = next((name for name in left_dense or () if re.search(r"\b\d+(\\?\.|$)", name)), None)
    if numbered is not None:
        raise ValueError(
            f"modules_to_not_convert: {numbered!r} names a block by its number, and drop_layers gives blocks other "
            "numbers: name layers without one, or drop the blocks first and prune the model that is left"
        )
    if len(blocks.list_names) > 1:
        raise _refusal(blocks, f"it has several stacks of blocks ({', '.join(blocks.list_names)})")
    total = len(blocks.blocks)
    if not 1 <= number < total:
        raise ValueError(
            f"drop_layers={number} does not fit {type(blocks.model).__name__}, which has {total} decoder blocks: "
            f"allowed: 1 to {total - 1}" + (", so leave it out" if total == 1 else "")
        )
    config = _text_config(blocks.model.config)
    reason = why_not(config)
    if reason is None and config.num_hidden_layers != total:
        reason = f"its config says num_hidden_layers={config.num_hidden_layers}, and it has {total} decoder blocks"
    if reason is not None:
        raise _refusal(blocks, reason)
    _plan(blocks, list(range(total - number)))


def drop_blocks(blocks: DecoderBlocks, dropped: Sequence[int]) -> Callable[[], None]:
    """Takes the blocks of these numbers out of the model, its config and `blocks`.

    Returns:
        What puts them back.

    Raises:
        ValueError: the model without them would not be the one that its config describes; nothing has been changed.
    """
    kept = [index for index in range(len(blocks.blocks)) if index not in dropped]
    changes, attributes = _plan(blocks, kept)
    model, undo = blocks.model, ExitStack()
    total = len(blocks.blocks)
    modules = blocks.decoder.get_submodule(blocks.list_names[0])
    undo.callback(_replace_modules, modules, list(blocks.blocks))
    undo.callback(blocks.blocks.__setitem__, slice(None), list(blocks.blocks))
    blocks.blocks[:] = [blocks.blocks[index] for index in kept]
    undo.callback(blocks.paths.__setitem__, slice(None), list(blocks.paths))
    del blocks.paths[len(kept) :]
    _replace_modules(modules, blocks.blocks)
    for config in _text_configs(model, total):
        for name, value in changes.items():
            _set(config, name, value, undo)
    for path, name, value in attributes:
        _set(model.get_submodule(path), name, value, undo)
    devices = getattr(model, "hf_device_map", None)
    if devices is not None:
        _set(model, "hf_device_map", _renumbered(devices, blocks, kept, total), undo)
    return undo.close


def _plan(blocks: DecoderBlocks, kept: list[int]) -> tuple[dict[str, Any], list[_Change]]:
    """What to change in the config, and in the modules that stay, by their paths without the dropped blocks."""
    model = blocks.model
    changes = smaller(_text_config(model.config), kept, _sources(model))
    try:
        before, after = _skeleton(model, {}), _skeleton(model, changes)
    except (TypeError, ValueError, KeyError, IndexError, StrictDataclassError) as error:
        raise _refusal(blocks, f"no config of {len(kept)} blocks can be made of its own: {error}") from error
    prefix = blocks.prefixes[0]
    attributes = list(_outside(blocks, before, after, prefix))
    for new, old in enumerate(kept):
        pair = (before.get_submodule(f"{prefix}{old}"), after.get_submodule(f"{prefix}{new}"))
        attributes += _inside(blocks, (old, new), *pair, f"{prefix}{new}", changes)
    _check_state(blocks, kept, after, prefix)
    return changes, attributes


def _sources(model: PreTrainedModel) -> str:
    """The code that reads the config: of the model, its modules and the config itself."""
    kinds = {type(module) for module in model.modules()} | {type(_text_config(model.config)), type(model.config)}
    files = {kind.__module__ for kind in kinds if not kind.__module__.startswith("torch.")}
    return "\n".join(inspect.getsource(sys.modules[name]) for name in sorted(files) if name in sys.modules)


def _skeleton(model: PreTrainedModel, changes: dict[str, Any]) -> PreTrainedModel:
    """A model on the meta device by the config of `model` with changes, as it comes out of `config.json`."""
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(_text_config(config), name, value)
    with tempfile.TemporaryDirectory() as folder:
        config.to_json_file(os.path.join(folder, "config.json"), use_diff=False)
        read, _ = type(config).get_config_dict(folder)
    config = type(config).from_dict(read)
    with torch.device("meta"):
        built: PreTrainedModel = type(model)._from_config(config)
    return built


def _outside(blocks: DecoderBlocks, before: nn.Module, after: nn.Module, prefix: str) -> Iterator[_Change]:
    """Attributes of modules outside the blocks that depend on their number."""
    found = [{n: m for n, m in model.named_modules() if not n.startswith(prefix)} for model in (before, after)]
    _check_classes(blocks, "", *found)
    for path, name, _, value in _differences(*found):
        yield path, name, value


def _inside(
    blocks: DecoderBlocks,
    moved: tuple[int, int],
    before: nn.Module,
    after: nn.Module,
    path: str,
    changes: dict[str, Any],
) -> Iterator[_Change]:
    """The attributes in a block that hold its number, or a list of the config that has an entry for each block. Any
    other one that depends on its place would make another block of it."""
    old, new = moved
    found = [dict(block.named_modules()) for block in (before, after)]
    where = blocks.name_in_decoder(old)
    _check_classes(blocks, where, *found)
    for inner, name, was, value in _differences(*found):
        is_list = isinstance(value, list) and value == changes.get(name)
        if name not in _NUMBERS and not is_list and (type(was), was, value) != (int, old, new):
            raise _refusal(
                blocks,
                f"{name} of {f'{where}.{inner}'.rstrip('.')} would change from {was!r} to {value!r}, because it "
                "follows the place of the block",
            )
        yield f"{path}.{inner}".rstrip("."), name, value


def _check_classes(blocks: DecoderBlocks, where: str, before: _Modules, after: _Modules) -> None:
    for path in {**before, **after}:
        was, now = (type(found.get(path)).__name__ for found in (before, after))
        if was != now:
            raise _refusal(
                blocks,
                f"{f'{where}.{path}'.strip('.')} is {was} in this model and would be {now} in one of fewer blocks",
            )


def _differences(before: _Modules, after: _Modules) -> Iterator[tuple[str, str, Any, Any]]:
    """Path, attribute and both values wherever two trees of modules differ in a plain attribute."""
    for path, module in before.items():
        was, now = _attributes(module), _attributes(after[path])
        for name in {**was, **now}:
            if was.get(name) != now.get(name):
                yield path, name, was.get(name), now.get(name)


def _attributes(module: nn.Module) -> dict[str, Any]:
    def is_plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(map(is_plain, [*value, *value.values()]))
        return isinstance(value, _PLAIN) or (isinstance(value, list | tuple) and all(map(is_plain, value)))

    return {name: value for name, value in vars(module).items() if name[0] != "_" and is_plain(value)}


def _check_state(blocks: DecoderBlocks, kept: list[int], after: nn.Module, prefix: str) -> None:
    """The tensors that stay must be those of a model of the smaller config."""
    expected = {name: tensor.shape for name, tensor in after.state_dict().items()}
    found: dict[str, torch.Size] = {}
    for name, tensor in blocks.model.state_dict().items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            if int(number) not in kept:
                continue
            name = f"{prefix}{kept.index(int(number))}.{rest}"
        found[name] = tensor.shape
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            had, wanted = (list(shapes[name]) if name in shapes else "nothing" for shapes in (found, expected))
            raise _refusal(blocks, f"{name} would be {had}, where a model of {len(kept)} blocks has {wanted}")


def _refusal(blocks: DecoderBlocks, reason: str) -> ValueError:
    return ValueError(
        f"drop_layers: blocks of {type(blocks.model).__name__} cannot be dropped: {reason}; leave drop_layers out"
    )


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    found: PreTrainedConfig = config.get_text_config(decoder=True)
    return found


def _text_configs(model: PreTrainedModel, total: int) -> list[PreTrainedConfig]:
    """Every object in a model that is its text config, or a copy of it."""
    own = _text_config(model.config)
    configs = {
        id(config): config for config in (own, *(getattr(module, "config", None) for module in model.modules()))
    }
    return [c for c in configs.values() if type(c) is type(own) and c.num_hidden_layers == total]


def _replace_modules(modules: nn.Module, blocks: Sequence[nn.Module]) -> None:
    modules._modules.clear()
    modules._modules.update({str(index): block for index, block in enumerate(blocks)})


def _set(owner: Any, name: str, value: Any, undo: ExitStack) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name, None))
    setattr(owner, name, value)


def _renumbered(devices: dict[str, Any], blocks: DecoderBlocks, kept: list[int], total: int) -> dict[str, Any]:
    """accelerate's map of devices without the dropped blocks."""

    def path(index: int) -> str:
        return f"{blocks.prefixes[0]}{index}"

    moved = {path(old): path(new) for new, old in enumerate(kept)}
    dropped = {path(old) for old in range(total) if old not in kept}
    return {moved.get(name, name): place for name, place in devices.items() if name not in dropped}
