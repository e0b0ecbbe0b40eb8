"""A model whose decoder blocks stay on the disk, and are brought into memory one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ...blocks import DecoderBlocks
from ...checkpoint.files import WeightFiles
from ..memory import trim_heap


class DiskBlocks:
    """The decoder blocks of a model that `open_checkpoint` loaded, whose weights are on the meta device but within
    `resident`.

    Args:
        blocks: with accelerate's hooks, which are taken off.
        device: where a block is while it is in memory.
        empty: the same blocks on the meta device: their weights stand for those that are on the disk.
        files: those of the checkpoint.
    """

    def __init__(
        self,
        blocks: DecoderBlocks,
        device: torch.device,
        empty: DecoderBlocks,
        files: WeightFiles,
    ) -> None:
        from accelerate.hooks import remove_hook_from_submodules

        self.blocks, self.device, self._files = blocks, device, files
        self._offloaded = [_offloaded_weights(block) for block in blocks.blocks]
        self._shards: dict[int, Path] = {}
        remove_hook_from_submodules(blocks.model)
        for block, stand_ins in zip(blocks.blocks, empty.blocks, strict=True):
            _stand_in(block, stand_ins)
        if hasattr(blocks.model, "hf_device_map"):
            del blocks.model.hf_device_map  # nothing is offloaded by accelerate any more

    def take_shard(self, index: int, path: Path) -> None:
        """From now on the weights of block `index`, which holds sparse modules, are those in the file `path`."""
        self._shards[index] = path

    @contextmanager
    def resident(self, index: int) -> Iterator[None]:
        """Within it the weights of block `index` are in memory, on the device; on a CPU they are mapped from their
        file, and read when they are used. They are dropped after it, whatever has become of them. What another block,
        within whose `resident` this is, shares with it is there already, and stays.

        Raises:
            OSError: they cannot be read; names the tensor.
        """
        block = self.blocks.blocks[index]
        modules = set(block.modules())
        there = {module for module in modules if any(not p.is_meta for p in module.parameters(recurse=False))}
        stand_ins: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for name, tensor in self._read(index).items():
                if block.get_submodule(name.rpartition(".")[0]) in there:
                    continue
                stand_ins.append(_put(block, name, tensor.to(self.device)))
            yield
        finally:
            # Replaced ones too, which wait for the garbage collector: accelerate's hooks left circles in them.
            for tensors, name, stand_in in stand_ins:
                if name in tensors:
                    tensors[name] = stand_in
            _empty(modules.union(block.modules()) - there)
            trim_heap()

    def check_source(self, index: int) -> None:
        """Raises OSError where what block `index` was read from is no longer what it was when the run began."""
        if index not in self._shards:
            self._files.check({path.name for path, _ in self._offloaded[index].values()})

    def state_dict(self, index: int) -> dict[str, torch.Tensor]:
        """State of block `index`, by the names in the model; within `resident`."""
        prefix = f"{self.blocks.name_in_model(index)}."
        return {prefix + name: tensor for name, tensor in self.blocks.blocks[index].state_dict().items()}

    def _read(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of a block by their names in it, mapped into memory rather than read."""
        tensors: dict[str, torch.Tensor] = {}
        name = ""
        try:
            self.check_source(index)
            if index in self._shards:
                prefix = f"{self.blocks.name_in_model(index)}."
                with safe_open(self._shards[index], framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (not a dict)
                        tensors[name.removeprefix(prefix)] = file.get_tensor(name)
            else:
                block = self.blocks.blocks[index]
                for name, (path, key) in self._offloaded[index].items():
                    with safe_open(path, framework="pt") as file:
                        tensors[name] = file.get_tensor(key).to(attrgetter(name)(block).dtype)
        except Exception as error:  # of safetensors, of the system
            where = self.blocks.name_in_model(index, name)
            raise OSError(f"tensor {where} cannot be read: {type(error).__name__}: {error}") from error
        return tensors


def _offloaded_weights(block: nn.Module) -> dict[str, tuple[Path, str]]:
    """File, and name in it, of each offloaded parameter or mask of a block, by name."""
    places = {}
    for path, module in block.named_modules():
        weights: Any = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if tensor.is_meta:
                    entry = weights.dataset.index[weights.prefix + name]
                    place = Path(entry["safetensors_file"]), entry.get("weight_name", weights.prefix + name)
                    places[f"{path}.{name}".lstrip(".")] = place
    return places


def _stand_in(block: nn.Module, empty: nn.Module) -> None:
    """Puts the parameters of `empty` in the places of those that are on the disk: they have the dtype that each one
    gets, which is not always the model's, and two names of one weight still hold one and the same."""
    for path, module in block.named_modules():
        other = empty.get_submodule(path)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = other._parameters[name]


def _put(block: nn.Module, name: str, tensor: torch.Tensor) -> tuple[dict[str, Any], str, Any]:
    """Puts a tensor in its place. Gives the place, and what was there."""
    path, _, leaf = name.rpartition(".")
    module = block.get_submodule(path)
    tensors: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
    old = tensors[leaf]
    tensors[leaf] = (
        tensor if tensors is module._buffers else nn.Parameter(tensor, old is not None and old.requires_grad)
    )
    return tensors, leaf, old


def _empty(modules: Iterable[nn.Module]) -> None:
    """Drops what can be read again; buffers that no file holds stay."""
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                empty = torch.empty_like(parameter, device="meta")
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name in ("weight_mask", "weight_scale"):
            buffer = module._buffers.get(name)
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="meta")
