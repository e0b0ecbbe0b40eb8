"""A checkpoint that is pruned from disk to disk: the `Place` of `prune_checkpoint`."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedModel
from transformers.utils import logging

from ...blocks import Activations, BlockReplay
from ...checkpoint import check_space, install_layers, layer_records, sha256_of, tensor_digests
from ...config import SparsityConfig
from ...data import CalibrationTokens
from ...nn import densified
from ...pattern import Pattern
from ...quantization import BITS, groups_of_row
from ...report import PrunedBlock
from ..job import Place
from ..memory import peak_memory
from ..targets import Layer, stored_bytes, weight_of
from .blocks import DiskBlocks
from .journal import Snapshot, is_whole
from .workspace import Workspace

logger = logging.get_logger(__name__)

T = TypeVar("T")

# Activations that are in memory are saved this often: what a killed run has to compute again.
_SNAPSHOT_SECONDS = 60.0


@dataclass(kw_only=True)
class DiskPlace(Place):
    """Blocks that lie on disk, and an open workspace that keeps what is done, with what an earlier run has left. More
    bytes of activations than `activation_memory` go to files."""

    disk: DiskBlocks
    config: SparsityConfig
    workspace: Workspace
    activation_memory: int

    def __post_init__(self) -> None:
        self.done = [PrunedBlock(block.rows, block.reconstruction) for block in self.workspace.journal.blocks]
        self._noted = self._saved_at = time.perf_counter()

    def resident(self, index: int) -> AbstractContextManager[None]:
        return self.disk.resident(index)

    def check_space(self, targets: list[dict[str, Layer]]) -> None:
        self.processes.once(lambda: check_run_space(self.model, targets, self.config, self.workspace))

    def tokens(self, draw: Callable[[], CalibrationTokens]) -> CalibrationTokens:
        return self.processes.once(lambda: self.workspace.tokens(draw))

    def activations(self, num_batches: int, name: str) -> Activations:
        name = f"{name}-{self.processes.rank}-of-{self.processes.size}"
        return Activations(num_batches, self.activation_memory, self.workspace.path, name)

    def measured(self, name: str, kind: type[T], measure: Callable[[], T]) -> T:
        """Once for a run and those that go on with it."""
        processes, workspace = self.processes, self.workspace
        earlier = processes.once(lambda: workspace.kept(name, kind))
        if earlier is not None:
            return earlier
        measured = measure()
        for path in workspace.path.glob(f"{name}-{processes.rank}-of-*"):
            path.unlink()
        processes.once(lambda: workspace.keep(name, measured))
        return measured

    def resume(self, replay: BlockReplay | None, original: BlockReplay | None, config: SparsityConfig) -> None:
        if original is not None:
            self._catch_up(original, lambda snapshot: snapshot.originals)
        if replay is not None and config.activations == "dense":
            self._catch_up(replay, lambda snapshot: snapshot.files)
        for index, block in enumerate(self.workspace.journal.blocks):
            install_layers(self.model, block.layers, **config.quantisation)
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
                snapshot = Snapshot(index + 1, self._saved(replay))
                if original is not None:
                    snapshot.originals = self._saved(original)
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

    def _saved(self, replay: BlockReplay) -> dict[str, str]:
        """Saves the activations, and gives the names and checksums of the files of all processes."""
        files = self.processes.gather({path.name: sha256_of(path) for path in replay.hidden.save()})
        return {name: sha256 for files_of_one in files for name, sha256 in files_of_one.items()}

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
        if snapshot is not None:
            saved = files(snapshot)  # another number of processes has others
            if all(processes.gather(all(is_whole(p, saved.get(p.name)) for p in replay.hidden.paths(snapshot.block)))):
                replay.hidden.load(snapshot.block)
                at = snapshot.block
            elif processes.is_main:
                logger.warning(
                    f"The saved activations ({', '.join(list(saved)[:3])}, …) are missing, no longer what was "
                    "written, or of another number of processes: they are computed anew."
                )
        for index in range(at, done):
            block = self.disk.blocks.blocks[index]
            with self.disk.resident(index), densified(block, replay.dtype):
                replay.advance(index, block)


def check_run_space(
    model: PreTrainedModel, targets: list[dict[str, Layer]], config: SparsityConfig, workspace: Workspace
) -> None:
    """Raises OSError where the disk is too small for what is still to be written, as far as can be told."""
    density = config.method_setting("target_density") or Pattern(config.pattern).density
    size = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    pruned = [layer for layers in targets for layer in layers.values()]
    dense, packed = 0, 0.0
    for weight in map(weight_of, pruned):
        dense += weight.nbytes
        packed += weight.numel() / 8
        if config.values is None or config.group_size is None:
            packed += weight.nbytes * density
        else:
            groups = groups_of_row(config.group_size, weight.shape[-1])
            packed += weight.numel() * density * BITS[config.values] / 8 + weight[..., 0].nbytes * groups
    needed = sum(size.values()) - sum(map(stored_bytes, pruned)) + packed
    if config.storage == "dense":  # packed blocks are written first, and become dense ones at the end
        needed += dense
    if config.needs_data and workspace.journal.phase == "pruning":
        hidden = int(getattr(model.config.get_text_config(decoder=True), "hidden_size", 0))
        sets = 2 if config.reconstruct is None else 4
        needed += sets * config.num_samples * config.seq_len * hidden * model.dtype.itemsize
    needed = max(0, needed - workspace.written_bytes())
    check_space(workspace.path, int(needed), "the sparse checkpoint and the calibration activations")
