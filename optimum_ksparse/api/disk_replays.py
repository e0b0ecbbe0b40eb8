"""Calibration activations of a run from disk to disk, and what is measured with them before anything is pruned."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from transformers.utils import logging

from ..calibration import Activations, BlockReplay
from ..distributed import Processes
from ..nn import densified
from ..streaming import DiskBlocks, Snapshot, Workspace, is_whole

logger = logging.get_logger(__name__)

T = TypeVar("T")


@dataclass
class DiskReplays:
    """Starts replays of the calibration samples through blocks that lie on disk.

    Attributes:
        disk: the blocks.
        ids: this process's part of the calibration samples, [samples, seq_len].
        batch_size, skip_first, dtype: as `BlockReplay` takes them.
        activation_memory: bytes of activations that stay in memory; the others go to files.
        workspace: where those files lie, with what an earlier run has left.
        processes: which share the samples.
    """

    disk: DiskBlocks
    ids: torch.Tensor
    batch_size: int
    skip_first: bool
    dtype: torch.dtype | None
    activation_memory: int
    workspace: Workspace
    processes: Processes

    def start(self, folder: Path | None = None) -> BlockReplay:
        """The activations at the first block; what does not fit into memory goes to `folder`, or the workspace."""
        hidden = Activations(
            -(-len(self.ids) // self.batch_size),
            self.activation_memory,
            self.workspace.path if folder is None else folder,
            f"activations-{self.processes.rank}-of-{self.processes.size}",
        )
        return BlockReplay(
            self.disk.blocks, self.ids, self.batch_size, self.skip_first, self.disk.resident, hidden, self.dtype
        )

    def measured(self, name: str, kind: type[T], measure: Callable[..., T]) -> T:
        """What is measured on the dense model before the first block is pruned, once for a run and those that go on
        with it."""
        processes, workspace = self.processes, self.workspace
        known = processes.once(lambda: workspace.kept(name, kind))
        if known is not None:
            return known
        folder = workspace.folder(f"measuring-{processes.rank}")
        measured = measure(self.start(folder), resident=self.disk.resident, processes=processes)
        shutil.rmtree(folder, ignore_errors=True)
        processes.once(lambda: workspace.keep(name, measured))
        return measured

    def catch_up(self, replay: BlockReplay, files: Callable[[Snapshot], dict[str, str]]) -> None:
        """Brings the activations to the first block that is not done: from their `files` of the latest snapshot, where
        these are whole, through the blocks after it as they are now."""
        # A snapshot holds hidden states alone.
        processes, snapshot = self.processes, None if replay.has_states else self.workspace.journal.snapshot
        done, at = len(self.workspace.journal.blocks), 0
        if not replay.in_line:
            replay.enter(done)
            return
        # Another number of processes has other files.
        saved = {} if snapshot is None else files(snapshot)
        if snapshot is not None and len(saved) == processes.size:
            mine = list(saved)[processes.rank]
            is_there = is_whole(self.workspace.path / mine, saved[mine])
            if all(processes.gather(is_there and replay.hidden.can_load(mine, snapshot.block))):
                replay.hidden.load(mine)
                at = snapshot.block
            elif processes.is_main:
                logger.warning(
                    f"The saved activations ({', '.join(saved)}) are missing or no longer what was written: they are "
                    "computed anew."
                )
        for index in range(at, done):
            block = self.disk.blocks.blocks[index]
            with self.disk.resident(index), densified(block, replay.dtype):
                replay.advance(index, block)
