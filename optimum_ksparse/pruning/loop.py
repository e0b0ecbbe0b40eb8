"""The block loop, the only one: collect → prune → (reconstruct) → propagate, one decoder block at a time, with what
there is to report of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import nn

from ..blocks import BlockReplay, DecoderBlocks, always_there
from ..config import SparsityConfig
from ..nn import densified
from ..report import PrunedBlock
from .block import Replaced, prune_one_block
from .distributed import Processes
from .progress import block_progress
from .targets import Layer

_Row = TypeVar("_Row")


def needs_original(config: SparsityConfig, replay: BlockReplay) -> bool:
    """Whether the activations of the dense model are needed at every block beside those of the pruned one, which are
    in `replay`."""
    mixes = config.activations == "mixed" or (config.activations is None and replay.in_line)
    return config.reconstruct is not None and mixes


def check_replay(
    blocks: DecoderBlocks, targets: list[dict[str, Layer]], config: SparsityConfig, replay: BlockReplay
) -> None:
    """Raises ValueError where the calibration tokens do not reach a block that is to be pruned, or the settings do not
    fit the way in which the model runs its blocks."""
    for index, layers in enumerate(targets):
        if layers and not replay.times(index):
            inside = re.escape(f"{blocks.name_in_model(index)}.")
            raise ValueError(
                f"{blocks.name_in_decoder(index)}: no calibration token reached this block, which text passes by; "
                f"leave its layers dense with modules_to_not_convert=[{inside!r}]"
            )
    if not replay.in_line and config.activations in ("dense", "mixed"):
        raise ValueError(
            f"activations={config.activations!r} keeps the dense model's activations beside the pruned one's, block "
            f"by block, and {type(blocks.model).__name__} runs its blocks several times, or changes the hidden states "
            "between them: leave it out, or pass 'pruned'"
        )


def each_block(
    description: str,
    blocks: DecoderBlocks,
    step: Callable[[int, nn.Module], list[_Row]],
    *,
    resident: Callable[[int], AbstractContextManager[None]] = always_there,
    start: int = 0,
    tokens: int = 0,
    show: bool = True,
) -> list[_Row]:
    """Calls `step(index, block)` for each block from `start` on, while it is resident, and shows the progress.

    Returns:
        The rows of all steps.
    """
    rows: list[_Row] = []
    total = len(blocks.blocks)
    with block_progress(description, total, start, tokens, show=show) as advance:
        for index in range(start, total):
            with resident(index):
                done = step(index, blocks.blocks[index])
            rows += done
            advance()
    return rows


@torch.no_grad()
def prune_blocks(
    blocks: DecoderBlocks,
    targets: list[dict[str, Layer]],
    config: SparsityConfig,
    replay: BlockReplay | None,
    replaced: Replaced | None = None,
    *,
    original: BlockReplay | None = None,
    resident: Callable[[int], AbstractContextManager[None]] = always_there,
    finished: Callable[[int, PrunedBlock], None] | None = None,
    start: int = 0,
    processes: Processes | None = None,
    patterns: Mapping[str, str] | None = None,
) -> list[PrunedBlock]:
    """Prunes `targets` block by block and puts sparse modules in their places.

    Args:
        blocks: the model's blocks.
        targets: for each block its layers to prune by name, as `find_targets` gives them; emptied on the way.
        config: method, pattern and settings.
        replay: the calibration activations at block `start`; None for a method without data.
        replaced: is given what was there before, as soon as it is replaced.
        original: the activations of the dense model at block `start`, where `needs_original` says so.
        resident: where the blocks come from: within `resident(index)` that block's weights are there.
        finished: where they go: called, while the block is there, when it is pruned and the activations are at the
            next one.
        start: the first block to prune.
        processes: which share the work; each has its part of the calibration samples. None: this one alone.
        patterns: of layers that have their own, by their paths in the decoder.

    Returns:
        What there is to report of each block. Layers are pruned in the model's order, so on an error the blocks before
        it are sparse.

    Raises:
        ValueError: activations are NaN or Inf, or no token reached a layer; names the layer.
        ArithmeticError: a Gram matrix stays singular; names the layer.
        ConnectionError: another process has stopped.
    """
    processes = Processes() if processes is None else processes
    total = len(blocks.blocks)
    tokens = 0 if replay is None else sum(processes.gather(replay.tokens.numel()))
    if replay is not None:
        check_replay(blocks, targets, config, replay)

    def step(index: int, block: nn.Module) -> list[PrunedBlock]:
        dense = _dense_path(index, block, config, replay, original)
        outputs = None if dense is None else dense.hidden
        pruned = prune_one_block(
            blocks, index, targets[index], config, replay, outputs, replaced, processes, patterns or {}
        )
        if replay is not None and index + 1 < total:
            _advance(index, block, config, replay, dense)
        if finished is not None:
            finished(index, pruned)
        targets[index] = {}  # the last hold on the block's dense weights
        return [pruned]

    return each_block(
        _title(config),
        blocks,
        step,
        resident=resident,
        start=start,
        tokens=tokens,
        show=processes.is_main,
    )


def _title(config: SparsityConfig) -> str:
    steps = (config.method, *config.refine, *([config.reconstruct] if config.reconstruct else []))
    return f"Pruning ({' + '.join(steps)} {config.pattern})"


def _dense_path(
    index: int, block: nn.Module, config: SparsityConfig, replay: BlockReplay | None, original: BlockReplay | None
) -> BlockReplay | None:
    """Activations at the next block, which the still dense block gives: from the dense model's inputs, where these are
    at hand; otherwise from those of `replay`. None where nothing asks for it."""
    if replay is None or (config.reconstruct is None and config.activations != "dense"):
        return None
    path = replay.fork("dense") if original is None else original
    path.advance(index, block)
    return path


def _advance(
    index: int, block: nn.Module, config: SparsityConfig, replay: BlockReplay, dense: BlockReplay | None
) -> None:
    """Brings the activations to the next block: those that the pruned block gives, or, with `activations="dense"`,
    those that the dense one gave."""
    if config.activations == "dense" and dense is not None:
        replay.take(dense)
        return
    with densified(block, replay.dtype):
        replay.advance(index, block)
