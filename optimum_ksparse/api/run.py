"""One run of `prune_checkpoint`, which may go on with an earlier one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..allocation import Allocation
from ..calibration import BlockReplay, ExpertStack, eager_experts, evaluation_mode, save_tokenizer
from ..checkpoint import install_layers, layer_records
from ..choosing import choose_method
from ..config import AUTO, SparsityConfig
from ..distributed import Processes
from ..evaluation import fingerprint, tensor_digests
from ..layer_dropping import check_drop, drop_blocks, measure_drop
from ..memory import peak_memory
from ..pruning import needs_original, prune_blocks
from ..report import REPORT_NAME, DroppedBlocks, MethodChoice, PrunedBlock, SparsityReport
from ..sensitivity import leave_dense, measure_allocation
from ..staging import check_places
from ..streaming import DiskBlocks, Snapshot, WeightFiles, Workspace, find_weight_files, open_checkpoint, sha256_of
from ..targets import find_targets
from ..version import library_versions
from .disk_replays import DiskReplays
from .model import (
    attach,
    calibration_dtype,
    check_model,
    draw_tokens,
    load_tokenizer,
    make_report,
    note_sensitivities,
    own_patterns,
    record_settings,
    replay_batch_size,
    share_tokens,
)
from .space import check_run_space

logger = logging.get_logger(__name__)

# Activations that are in memory are saved this often: what a killed run has to compute again.
_SNAPSHOT_SECONDS = 60.0


class CheckpointRun:
    """One call of `prune_checkpoint`, after its arguments have been checked."""

    def __init__(
        self,
        source: str | os.PathLike[str],
        config: SparsityConfig,
        workspace: Workspace,
        files: WeightFiles,
        processes: Processes,
        dtype: torch.dtype | str,
        device: torch.device,
        activation_memory: int,
        model_class: Any,
        loading: dict[str, Any],
    ) -> None:
        self.source, self.config, self.workspace, self.files = source, config, workspace, files
        self.processes, self.dtype, self.device = processes, dtype, device
        self.activation_memory, self.model_class, self.loading = activation_memory, model_class, loading
        self.noted = self.saved = time.perf_counter()

    def __call__(self, resume: bool, overwrite: bool = False) -> SparsityReport:
        workspace, processes = self.workspace, self.processes
        try:
            finished = processes.once(lambda: self._begin(resume, overwrite))
            if finished is not None:
                return finished
            workspace.journal = processes.once(lambda: workspace.journal)
            if workspace.journal.phase != "complete":
                with self._same_environment():
                    self._prune()
            return processes.once(workspace.publish)
        finally:
            if processes.is_main:
                workspace.release()

    def _begin(self, resume: bool, overwrite: bool) -> SparsityReport | None:
        """Opens the workspace; the report where this job is finished already."""
        self.workspace.lock()
        self.workspace.journal.environment = {**self._environment(), "threads": torch.get_num_threads()}
        finished = None
        if resume and not self.workspace.is_unfinished:
            finished = _finished_report(self.workspace, self.files.fingerprint(), overwrite)
        if finished is None:
            check_places(self.workspace.output)
            self.workspace.open(resume)
        return finished

    @contextmanager
    def _same_environment(self) -> Iterator[None]:
        """Within it torch has as many threads as when the run began, in all processes: the order of sums changes with
        them, and with it the last bits. Says what else is not as it was."""
        then, threads = self.workspace.journal.environment, torch.get_num_threads()
        now = self._environment()
        changed = [f"{name}: was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]
        if changed and self.processes.is_main:
            logger.warning(
                f"The run began in another environment ({'; '.join(changed)}): the last bits of its result may differ "
                "from those of a run that was not cut off."
            )
        if then["threads"] != threads and self.processes.is_main:
            logger.warning(f"The run goes on with {then['threads']} threads, as it began, and not with {threads}.")
        torch.set_num_threads(then["threads"])
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def _environment(self) -> dict[str, Any]:
        """What may change the last bits beside the settings, but the number of threads."""
        return {
            **library_versions("torch", "transformers"),
            "device": self.device.type,
            "processes": self.processes.size,
        }

    def _prune(self) -> None:
        config, workspace, processes = self.config, self.workspace, self.processes
        model, disk = open_checkpoint(
            self.source,
            self.model_class,
            self.files,
            dtype=self.dtype,
            device=self.device,
            offload_folder=workspace.folder(f"offload-{processes.rank}"),
            offload_space=self.files.num_bytes * processes.size,
            **self.loading,
        )
        check_model(model, config)
        blocks = disk.blocks
        if config.drop_layers is not None:
            check_drop(blocks, config.drop_layers, config.modules_to_not_convert)
        targets, skipped = find_targets(blocks, config)
        if config.drop_layers is None:
            processes.once(lambda: check_run_space(model, targets, config, workspace))
        with evaluation_mode(model), torch.no_grad():
            ids, data = self._tokens(model)
            replays = None if ids is None else self._replays(disk, ids, data)
            dropped = None if replays is None else self._dropped(replays)
        if dropped is not None:
            kept = [index for index in range(len(blocks.blocks)) if index not in dropped.blocks]
            drop_blocks(blocks, dropped.blocks)
            disk.keep(kept)
            targets, skipped = find_targets(blocks, config)
            processes.once(lambda: check_run_space(model, targets, config, workspace))
        num_parameters = model.num_parameters()
        done = list(workspace.journal.blocks)
        if not config.prunes_with_data:
            replays = None
        stacked = any(isinstance(layer, ExpertStack) for layers in targets for layer in layers.values())
        with evaluation_mode(model), eager_experts(model) if stacked else nullcontext(), torch.no_grad():
            allocation = None if replays is None else self._allocation(replays, targets)
            if allocation is not None:
                skipped |= leave_dense(blocks, targets, allocation)
            choice = None if replays is None else self._choice(replays, targets, own_patterns(allocation))
            config = config if choice is None else config.as_chosen(choice.method, choice.reconstruct)
            replay, original = self._go_on(model, disk, replays, config)
            pruned = [PrunedBlock(block.rows, block.reconstruction) for block in done]
            pruned += prune_blocks(
                blocks,
                targets,
                config,
                replay,
                original=original,
                resident=disk.resident,
                finished=lambda index, block: self._block_is_done(index, block, model, disk, replay, original),
                start=len(done),
                processes=processes,
                patterns=own_patterns(allocation),
            )
        note_sensitivities([row for block in pruned for row in block.layers], allocation)
        report = make_report(model, record_settings(self.config), num_parameters, data, pruned, skipped)
        report.choice, report.dropped = choice, dropped
        processes.once(lambda: self._finish(model, disk, report))

    def _go_on(
        self, model: PreTrainedModel, disk: DiskBlocks, replays: DiskReplays | None, config: SparsityConfig
    ) -> tuple[BlockReplay | None, BlockReplay | None]:
        """Puts the blocks that are done into the model, and brings the activations to the first one that is not.

        Returns:
            The activations of the pruned model, None where none are needed, and those of the dense one, None where
            they are not needed beside these.
        """
        done = self.workspace.journal.blocks
        replay = original = None
        if replays is not None and len(done) < len(disk.blocks.blocks):
            replay = replays.start()
            if needs_original(config, replay):
                original = replay.fork("original")
                replays.catch_up(original, lambda snapshot: snapshot.originals)
            if config.activations == "dense":
                replays.catch_up(replay, lambda snapshot: snapshot.files)
        for index, block in enumerate(done):
            install_layers(model, block.layers)
            disk.take_shard(index, self.workspace.path / block.file)
        if replays is not None and replay is not None and config.activations != "dense":
            replays.catch_up(replay, lambda snapshot: snapshot.files)
        return replay, original

    def _tokens(self, model: PreTrainedModel) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """This process's part of the calibration samples, and the description of all; None without data."""
        if not self.config.needs_data:
            return None, {}

        def draw() -> tuple[torch.Tensor, dict[str, Any]]:
            drawn = draw_tokens(model, self.config, load_tokenizer(self.config, self.source, **self.loading))
            assert drawn is not None
            return drawn.ids, drawn.description

        ids, description = self.processes.once(lambda: self.workspace.tokens(draw))
        return share_tokens(ids, replay_batch_size(self.config), self.processes), description

    def _replays(self, disk: DiskBlocks, ids: torch.Tensor, description: dict[str, Any]) -> DiskReplays:
        skip_first = description["begins_with_bos"] and not self.config.bos_in_statistics
        return DiskReplays(
            disk,
            ids,
            replay_batch_size(self.config),
            skip_first,
            calibration_dtype(self.config),
            self.activation_memory,
            self.workspace,
            self.processes,
        )

    def _dropped(self, replays: DiskReplays) -> DroppedBlocks | None:
        """The blocks to drop: those of the run that this one goes on with, or newly chosen ones."""
        number = self.config.drop_layers
        if number is None:
            return None

        def measure(replay: BlockReplay, **how: Any) -> DroppedBlocks:
            return measure_drop(replays.disk.blocks, number, replay, **how)

        return replays.measured("dropped", DroppedBlocks, measure)

    def _allocation(self, replays: DiskReplays, targets: list[dict[str, Any]]) -> Allocation | None:
        """The layers' own patterns: those of the run that this one goes on with, or newly measured ones, which are
        kept for a later run."""
        if self.config.allocation == "uniform":
            return None
        measure = partial(measure_allocation, replays.disk.blocks, targets, self.config)
        return replays.measured("allocation", Allocation, measure)

    def _choice(
        self, replays: DiskReplays, targets: list[dict[str, Any]], patterns: dict[str, str]
    ) -> MethodChoice | None:
        """What `method="auto"` has chosen, in this run or in the one that it goes on with."""
        if self.config.method != AUTO:
            return None
        measure = partial(choose_method, replays.disk.blocks, targets, self.config, patterns=patterns)
        return replays.measured("choice", MethodChoice, measure)

    def _block_is_done(
        self,
        index: int,
        pruned: PrunedBlock,
        model: PreTrainedModel,
        disk: DiskBlocks,
        replay: BlockReplay | None,
        original: BlockReplay | None,
    ) -> None:
        workspace, processes = self.workspace, self.processes
        snapshot = None
        if replay is not None and not replay.has_states and index + 1 < len(disk.blocks.blocks):
            due = time.perf_counter() - self.saved > _SNAPSHOT_SECONDS
            # Files that the next block would write over are saved with every block.
            if any(processes.gather(replay.hidden.in_files or due)):
                snapshot = Snapshot(index + 1, self._saved(replay, index + 1))
                if original is not None:
                    snapshot.originals = self._saved(original, index + 1)
                self.saved = time.perf_counter()
        peaks = processes.gather(peak_memory())
        processes.each(lambda: disk.check_source(index))

        def note() -> str:
            prefix = f"{disk.blocks.name_in_decoder(index)}."
            layers = {name: layer for name, layer in layer_records(model).items() if name.startswith(prefix)}
            digests = [tensor_digests(module) for module in disk.blocks.blocks[index].modules()]
            workspace.add_block(index, disk.state_dict(index), layers, pruned, digests)
            if snapshot is not None:
                workspace.journal.snapshot = snapshot
            self._note_costs(peaks)
            workspace.journal.save(workspace.path)
            return workspace.journal.blocks[-1].file

        file = processes.once(note)  # an error in it stops all
        # A later block's inputs may come from runs of the whole model, in which this one is called as it is now.
        disk.take_shard(index, workspace.path / file)

    def _saved(self, replay: BlockReplay, block: int) -> dict[str, str]:
        """Saves the activations, and gives the names and checksums of the files of all processes."""
        path = self.workspace.path / replay.hidden.save(block)
        return dict(self.processes.gather((path.name, sha256_of(path))))

    def _note_costs(self, peaks: list[dict[str, int]]) -> None:
        journal, now = self.workspace.journal, time.perf_counter()
        journal.seconds += now - self.noted
        self.noted = now
        for name, peak in (item for peaks_of_one in peaks for item in peaks_of_one.items()):
            journal.peak_memory_bytes[name] = max(peak, journal.peak_memory_bytes.get(name, 0))

    def _finish(self, model: PreTrainedModel, disk: DiskBlocks, report: SparsityReport) -> None:
        attach(model, record_settings(self.config))
        if self.loading.get("subfolder"):
            report.base_arguments = {"subfolder": self.loading["subfolder"]}
        self.files.check()
        report.source_fingerprint = self.files.fingerprint()
        report.fingerprint = self._fingerprint(model, disk)
        self._note_costs([peak_memory()])
        report.seconds = round(self.workspace.journal.seconds, 2)
        report.peak_memory_bytes = self.workspace.journal.peak_memory_bytes
        model.sparsity_report = report  # type: ignore[assignment]
        self.workspace.finish(model, disk, self._save_tokenizer)

    def _fingerprint(self, model: PreTrainedModel, disk: DiskBlocks) -> str | None:
        """Of the pruned weights, whose blocks are on the disk; None where an earlier version pruned some of them."""
        known: dict[nn.Module, list[str]] = {}
        for block, done in zip(disk.blocks.blocks, self.workspace.journal.blocks, strict=True):
            modules = list(block.modules())
            if len(done.digests) != len(modules):
                return None
            known |= zip(modules, done.digests, strict=True)
        return fingerprint(model, known)

    def _save_tokenizer(self, folder: Path) -> None:
        if (error := save_tokenizer(self.source, folder, **self.loading)) is not None:
            reason = " ".join(str(error).split())
            logger.warning(f"The checkpoint has no tokenizer: none could be loaded from {self.source}: {reason}")


def _finished_report(workspace: Workspace, fingerprint: str, overwrite: bool) -> SparsityReport | None:
    """The report of a checkpoint that the same job has made already; None where there is none, or another job's may be
    replaced.

    Raises:
        FileExistsError: the folder holds a checkpoint that another job made, and may not be replaced.
        ValueError: a weight file of the checkpoint is missing, truncated or damaged, as its header tells.
    """
    if not (workspace.output / REPORT_NAME).is_file():
        return None
    report = SparsityReport.load(workspace.output / REPORT_NAME)
    values, _ = PreTrainedConfig.get_config_dict(workspace.output)
    job = workspace.journal.job
    same_dtype = job["dtype"] in ("auto", values.get("dtype"))
    if report.source_fingerprint == fingerprint and report.config == job["settings"] and same_dtype:
        try:
            find_weight_files(workspace.output)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"{workspace.output} holds what this call would make, but no longer whole ({error}): make it again "
                "with resume=False"
            ) from error
        logger.warning(
            f"{workspace.output} holds what this call would make; resume=False (--resume false) makes it again."
        )
        return report
    if overwrite:
        return None
    raise FileExistsError(
        f"{workspace.output} holds another sparse checkpoint; name another folder, or replace it with overwrite=True"
    )
