"""A checkpoint that is pruned from disk to disk: the `Place` of `prune_checkpoint`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ...blocks import Activations, BlockReplay
from ...checkpoint import install_layers, layer_records, sha256_of, tensor_digests
from ...config import SparsityConfig
from ...data import CalibrationTokens
from ...nn import densified
from ...report import PrunedBlock
from ..distributed import Processes
from ..job import Place
from ..memory import peak_memory
from ..targets import Layer
from .blocks import DiskBlocks
from .journal import Snapshot
from .recovery import is_whole
from .space import check_run_space
from .workspace import Workspace

logger = logging.get_logger(__name__)

T = TypeVar("T")

# Activations that are in memory are saved this often: what a killed run has to compute again.
_SNAPSHOT_SECONDS = 60.0


class DiskPlace(Place):
    """Blocks that lie on disk, and a workspace that keeps what is done.

    Args:
        model: without the weights of its blocks.
        disk: its blocks.
        config: what to do.
        workspace: which is open, with what an earlier run has left.
        processes: which share the samples.
        activation_memory: bytes of activations that stay in memory; the others go to files.
        tokenizer: gives the one for calibration text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        disk: DiskBlocks,
        config: SparsityConfig,
        workspace: Workspace,
        processes: Processes,
        activation_memory: int,
        tokenizer: Callable[[], PreTrainedTokenizerBase | None],
    ) -> None:
        super().__init__(model, disk.blocks, processes, tokenizer)
        self.disk, self.workspace = disk, workspace
        self._config, self._activation_memory = config, activation_memory
        self.done = [PrunedBlock(block.rows, block.reconstruction) for block in workspace.journal.blocks]
        self._noted = self._saved_at = time.perf_counter()

    def resident(self, index: int) -> AbstractContextManager[None]:
        return self.disk.resident(index)

    def check_space(self, targets: list[dict[str, Layer]]) -> None:
        self.processes.once(lambda: check_run_space(self.model, targets, self._config, self.workspace))

    def tokens(self, draw: Callable[[], CalibrationTokens]) -> CalibrationTokens:
        return self.processes.once(lambda: self.workspace.tokens(draw))

    def activations(self, num_batches: int, folder: Path | None) -> Activations:
        rank, size = self.processes.rank, self.processes.size
        folder = self.workspace.path if folder is None else folder
        return Activations(num_batches, self._activation_memory, folder, f"activations-{rank}-of-{size}")

    def measured(self, name: str, kind: type[T], measure: Callable[[Path | None], T]) -> T:
        """Once for a run and those that go on with it."""
        processes, workspace = self.processes, self.workspace
        known = processes.once(lambda: workspace.kept(name, kind))
        if known is not None:
            return known
        folder = workspace.folder(f"measuring-{processes.rank}")
        measured = measure(folder)
        shutil.rmtree(folder, ignore_errors=True)
        processes.once(lambda: workspace.keep(name, measured))
        return measured

    def resume(self, replay: BlockReplay | None, original: BlockReplay | None, config: SparsityConfig) -> None:
        if original is not None:
            self._catch_up(original, lambda snapshot: snapshot.originals)
        if replay is not None and config.activations == "dense":
            self._catch_up(replay, lambda snapshot: snapshot.files)
        for index, block in enumerate(self.workspace.journal.blocks):
            install_layers(self.model, block.layers)
            self.disk.take_shard(index, self.workspace.path / block.file)
        if replay is not None and config.activations != "dense":
            self._catch_up(replay, lambda snapshot: snapshot.files)

    def block_is_done(
        self,
        index: int,
        pruned: PrunedBlock,
        replay: BlockReplay | None,
        original: BlockReplay | None,
    ) -> None:
        workspace, processes, disk = self.workspace, self.processes, self.disk
        snapshot = None
        if replay is not None and not replay.has_states and index + 1 < len(disk.blocks.blocks):
            due = time.perf_counter() - self._saved_at > _SNAPSHOT_SECONDS
            # Files that the next block would write over are saved with every block.
            if any(processes.gather(replay.hidden.in_files or due)):
                snapshot = Snapshot(index + 1, self._saved(replay, index + 1))
                if original is not None:
                    snapshot.originals = self._saved(original, index + 1)
                self._saved_at = time.perf_counter()
        peaks = processes.gather(peak_memory())
        processes.each(lambda: disk.check_source(index))

        def note() -> str:
            prefix = f"{disk.blocks.name_in_decoder(index)}."
            layers = {name: layer for name, layer in layer_records(self.model).items() if name.startswith(prefix)}
            digests = [tensor_digests(module) for module in disk.blocks.blocks[index].modules()]
            workspace.add_block(index, disk.state_dict(index), layers, pruned, digests)
            if snapshot is not None:
                workspace.journal.snapshot = snapshot
            self.note_costs(peaks)
            workspace.journal.save(workspace.path)
            return workspace.journal.blocks[-1].file

        file = processes.once(note)  # an error in it stops all
        # A later block's inputs may come from runs of the whole model, in which this one is called as it is now.
        disk.take_shard(index, workspace.path / file)

    def _saved(self, replay: BlockReplay, block: int) -> dict[str, str]:
        """Saves the activations, and gives the names and checksums of the files of all processes."""
        path = self.workspace.path / replay.hidden.save(block)
        return dict(self.processes.gather((path.name, sha256_of(path))))

    def note_costs(self, peaks: list[dict[str, int]]) -> None:
        """Adds the time since the last call, and the peaks of memory of all processes, to the journal."""
        journal, now = self.workspace.journal, time.perf_counter()
        journal.seconds += now - self._noted
        self._noted = now
        for name, peak in (item for peaks_of_one in peaks for item in peaks_of_one.items()):
            journal.peak_memory_bytes[name] = max(peak, journal.peak_memory_bytes.get(name, 0))

    def _catch_up(self, replay: BlockReplay, files: Callable[[Snapshot], dict[str, str]]) -> None:
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
