"""A model whose decoder blocks stay on the disk, and are brought into memory one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from ...blocks import DecoderBlocks, find_blocks
from ...blocks.experts import find_stacks
from ...checkpoint import check_loaded
from ...checkpoint.files import WeightFiles, check_space
from ..memory import trim_heap


def open_checkpoint(
    source: str | os.PathLike[str],
    model_class: Any,
    files: WeightFiles,
    *,
    dtype: Any,
    device: torch.device,
    offload_folder: Path,
    offload_space: int,
    **loading: Any,
) -> tuple[PreTrainedModel, DiskBlocks]:
    """Loads a checkpoint with everything but its decoder blocks, which stay on the disk.

    transformers itself loads it, with accelerate's offloading to the disk, so that names, dtypes, ties and conversions
    are those of any other load. What is stored in another form than the model's (most experts) it writes out into
    `offload_folder`; everything else is read from the checkpoint's own files.

    Args:
        source: folder or Hub id.
        model_class: `AutoModelForCausalLM`, another Auto class, or a model's class.
        files: of the checkpoint; that they stay as they are is checked whenever they are read.
        dtype: as in `from_pretrained`.
        device: where the blocks run.
        offload_folder: an empty folder, for as long as the model is used.
        offload_space: bytes that its disk must have free, where the model may store weights in another form.
        loading: further arguments of `from_pretrained` that say where the files are.

    Raises:
        ValueError: the model has no decoder blocks, or the checkpoint lacks weights of it.
    """
    arguments = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, **loading}
    # Reads no weights: it tells where the blocks are, which dtype each weight gets, which are one and the same, and
    # whether all are there.
    skeleton, info = model_class.from_pretrained(source, device_map={"": "meta"}, **arguments)
    empty = find_blocks(skeleton)
    check_loaded(empty, [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
    if any(find_stacks(block) for block in empty.blocks):
        check_space(offload_folder, offload_space, "weights that are stored in another form than the model's")
    model, _ = model_class.from_pretrained(
        source, device_map=_device_map(empty, device), offload_folder=offload_folder, **arguments
    )
    files.check()
    return model, DiskBlocks(empty.of(model), device, empty, files)


def _device_map(blocks: DecoderBlocks, device: torch.device) -> dict[str, str]:
    """Every block on the disk, everything else on `device`: module by module down to the lists of blocks, because an
    entry for the whole model would win over theirs."""
    places: dict[str, str] = {}

    def place(module: nn.Module, prefix: str) -> None:
        if prefix in blocks.prefixes:
            return
        if not any(inside.startswith(prefix) for inside in blocks.prefixes):
            places[prefix.removesuffix(".")] = str(device)
            return
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        places.update({f"{prefix}{name}": str(device) for name, _ in tensors})
        for name, child in module.named_children():
            place(child, f"{prefix}{name}.")

    place(blocks.model, "")
    return places | {blocks.name_in_model(index): "disk" for index in range(len(blocks.blocks))}


class DiskBlocks:
    """The decoder blocks of a model that `open_checkpoint` loaded.

    Args:
        blocks: the blocks, with accelerate's hooks, which are taken off.
        device: where a block is while it is in memory.
        empty: the same blocks on the meta device: their weights stand for those that are on the disk.
        files: those of the checkpoint.
        prefetch: read the next block while this one is used; None does so where the device is no CPU.

    Attributes:
        blocks: the blocks; their weights are on the meta device but within `resident`.
    """

    def __init__(
        self,
        blocks: DecoderBlocks,
        device: torch.device,
        empty: DecoderBlocks,
        files: WeightFiles,
        prefetch: bool | None = None,
    ) -> None:
        from accelerate.hooks import remove_hook_from_submodules

        self.blocks, self.device, self._files = blocks, device, files
        self._prefetch = device.type != "cpu" if prefetch is None else prefetch
        self._offloaded = [_offloaded_weights(block) for block in blocks.blocks]
        self._shards: dict[int, Path] = {}
        self._coming: dict[int, Future[dict[str, torch.Tensor]]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="block-reader")
        remove_hook_from_submodules(blocks.model)
        for block, stand_ins in zip(blocks.blocks, empty.blocks, strict=True):
            _stand_in(block, stand_ins)
        if hasattr(blocks.model, "hf_device_map"):
            del blocks.model.hf_device_map  # nothing is offloaded by accelerate any more

    def take_shard(self, index: int, path: Path) -> None:
        """From now on the weights of block `index`, which holds sparse modules, are those in the file `path`."""
        self._shards[index] = path
        self._coming.pop(index, None)

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
            for name, tensor in self._take(index).items():
                if block.get_submodule(name.rpartition(".")[0]) in there:
                    continue
                stand_ins.append(_put(block, name, tensor.to(self.device, non_blocking=True)))
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

    def _take(self, index: int) -> dict[str, torch.Tensor]:
        coming = self._coming.pop(index, None)
        tensors = self._read(index) if coming is None else coming.result()
        following = index + 1
        if self._prefetch and following < len(self.blocks.blocks) and following not in self._coming:
            self._coming = {following: self._reader.submit(self._read_whole, following)}
        return tensors

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
                        tensors[name] = file.get_tensor(key).to(block.get_parameter(name).dtype)
        except Exception as error:  # of safetensors, of the system
            where = self.blocks.name_in_model(index, name)
            raise OSError(f"tensor {where} cannot be read: {type(error).__name__}: {error}") from error
        return tensors

    def _read_whole(self, index: int) -> dict[str, torch.Tensor]:
        """Really reads them, into memory from which a GPU copies fast."""
        pinned = self.device.type == "cuda"
        tensors = {}
        for name, tensor in self._read(index).items():
            tensors[name] = torch.empty_like(tensor, pin_memory=pinned).copy_(tensor)
        return tensors


def _offloaded_weights(block: nn.Module) -> dict[str, tuple[Path, str]]:
    """For each offloaded parameter of a block, by its name, the file that it is in, and its name there."""
    found = {}
    for path, module in block.named_modules():
        weights: Any = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    entry = weights.dataset.index[weights.prefix + name]
                    place = Path(entry["safetensors_file"]), entry.get("weight_name", weights.prefix + name)
                    found[f"{path}.{name}".lstrip(".")] = place
    return found


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
        mask = module._buffers.get("weight_mask")
        if mask is not None:
            module._buffers["weight_mask"] = torch.empty_like(mask, device="meta")
