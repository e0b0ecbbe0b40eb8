"""Loading a dense checkpoint with everything but its decoder blocks, which stay on the disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as logging_of_transformers

from ...blocks import DecoderBlocks, find_blocks
from ...blocks.experts import find_stacks
from ...checkpoint import check_loaded, drop_record, sparse_modules
from ...checkpoint.files import WeightFiles, check_space
from ...config import SparsityConfig
from ...report import SparsityReport
from .blocks import DiskBlocks


@dataclass
class Source:
    """A dense checkpoint.

    Attributes:
        path: folder or Hub id.
        files: those of its weights; that they stay as they are is checked whenever they are read.
        model_class: `AutoModelForCausalLM`, another Auto class, or a model's class.
        dtype: as in `from_pretrained`.
        loading: further arguments of `from_pretrained` that say where the files are.
        made: of a sparse model of this package, which is to be quantised: the settings by which it was pruned.
        report: and the report on it, where it has one.
    """

    path: str | os.PathLike[str]
    files: WeightFiles
    model_class: Any
    dtype: torch.dtype | str
    loading: dict[str, Any]
    made: SparsityConfig | None = None
    report: SparsityReport | None = None


def open_checkpoint(
    source: Source, device: torch.device, offload_folder: Path, offload_space: int
) -> tuple[PreTrainedModel, DiskBlocks]:
    """Loads a checkpoint with everything but its decoder blocks, which stay on the disk.

    transformers itself loads it, with accelerate's offloading to the disk, so that names, dtypes, ties and conversions
    are those of any other load. What is stored in another form than the model's (most experts) it writes out into the
    empty `offload_folder`, whose disk must then have `offload_space` bytes free; everything else is read from the
    checkpoint's own files. Raises ValueError where there are no decoder blocks, or weights are missing.
    """
    arguments = {"dtype": source.dtype, "use_safetensors": True, "output_loading_info": True, **source.loading}
    if (
        source.made is not None and source.made.storage == "dense"
    ):  # a dense model, as long as its blocks are elsewhere
        arguments["config"] = AutoConfig.from_pretrained(source.path, **source.loading)
        drop_record(arguments["config"])
    load = partial(source.model_class.from_pretrained, source.path, **arguments)
    # Reads no weights: it tells where the blocks are, which dtype each weight gets, which are one and the same, and
    # whether all are there.
    with _without_progress():
        skeleton, info = load(device_map={"": "meta"})
    empty = find_blocks(skeleton)
    check_loaded(empty, [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
    if any(find_stacks(block) for block in empty.blocks):
        check_space(offload_folder, offload_space, "weights that are stored in another form than the model's")
    masks = bool(sparse_modules(skeleton))  # of a source that is packed, which are buffers
    with _without_warnings():
        model, _ = load(device_map=_device_map(empty, device), offload_folder=offload_folder, offload_buffers=masks)
    source.files.check()
    return model, DiskBlocks(empty.of(model), device, empty, source.files)


@contextmanager
def _without_progress() -> Iterator[None]:
    """Within it transformers shows no progress: there is nothing to wait for."""
    shows = logging_of_transformers.is_progress_bar_enabled()
    logging_of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        if shows:
            logging_of_transformers.enable_progress_bar()


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Within it accelerate does not warn that weights are on the disk, where they belong here."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


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
