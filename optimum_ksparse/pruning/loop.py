"""The block loop, the only one: collect → prune → (reconstruct) → propagate, one decoder block at a time, with what
there is to report of each."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from ..blocks import BlockReplay
from ..config import SparsityConfig
from ..nn import densified
from ..report import PrunedBlock
from .block import prune_one_block
from .job import Job
from .progress import blocks_with_progress

_Row = TypeVar("_Row")


def needs_original(config: SparsityConfig, replay: BlockReplay) -> bool:
    """Whether the activations of the dense model are needed at every block beside those of the pruned one, which are
    in `replay`."""
    mixes = config.activations == "mixed" or (config.activations is None and replay.in_line)
    return config.reconstruct is not None and mixes


def check_replay(job: Job, replay: BlockReplay) -> None:
    """Raises ValueError where the calibration tokens do not reach a block that is to be pruned, or the settings do not
    fit the way in which the model runs its blocks."""
    blocks, activations = job.blocks, job.config.activations
    for index, layers in enumerate(job.targets):
        if layers and not replay.times(index):
            inside = re.escape(f"{blocks.name_in_model(index)}.")
            raise ValueError(
                f"{blocks.name_in_decoder(index)}: no calibration token reached this block, which text passes by; "
                f"leave its layers dense with modules_to_not_convert=[{inside!r}]"
            )
    if not replay.in_line and activations in ("dense", "mixed"):
        raise ValueError(
            f"activations={activations!r} keeps the dense model's activations beside the pruned one's, block by "
            f"block, and {type(blocks.model).__name__} runs its blocks several times, or changes the hidden states "
            "between them: leave it out, or pass 'pruned'"
        )


def over_blocks(
    description: str,
    job: Job,
    replay: BlockReplay | None,
    step: Callable[[int, nn.Module], list[_Row]],
    start: int = 0,
) -> list[_Row]:
    """Calls `step(index, block)` for each block from `start` on, while it is resident, and shows the progress. Gives
    the rows of all steps."""
    if replay is not None:
        check_replay(job, replay)
    processes, blocks = job.processes, job.blocks.blocks
    tokens = 0 if replay is None else sum(processes.gather(replay.tokens.numel()))
    rows: list[_Row] = []
    for index in blocks_with_progress(description, len(blocks), start, tokens, processes.is_main):
        with job.place.resident(index):
            rows += step(index, blocks[index])
    return rows


@torch.no_grad()
def prune_blocks(job: Job, replay: BlockReplay | None, original: BlockReplay | None = None) -> list[PrunedBlock]:
    """Prunes the targets block by block, from the first that is not done, whose activations `replay` and `original`
    hold (None where they are not needed). Gives what there is to report of each. Targets are emptied on the way."""
    config = job.config

    def step(index: int, block: nn.Module) -> list[PrunedBlock]:
        dense = _dense_path(index, block, config, replay, original)
        pruned = prune_one_block(job, index, replay, None if dense is None else dense.hidden)
        if replay is not None and index + 1 < len(job.blocks.blocks):
            _advance(index, block, config, replay, dense)
        job.place.block_is_done(index, pruned, replay, original)
        job.targets[index] = {}  # the last hold on the block's dense weights
        return [pruned]

    steps = (config.method, *config.refine, *([config.reconstruct] if config.reconstruct else []))
    title = f"Pruning ({' + '.join(steps)} {config.pattern})"
    return over_blocks(title, job, replay, step, start=len(job.place.done))


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
