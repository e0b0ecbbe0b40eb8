"""One run of `prune_checkpoint`, which may go on with an earlier one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ...checkpoint import changed_files, facts_of, find_weight_files, fingerprint
from ...checkpoint.staging import check_places
from ...config import SparsityConfig, recorded_settings
from ...data import load_tokenizer, save_tokenizer
from ...pruners import METHODS
from ...records import REPORT_NAME
from ...report import SparsityReport
from ...version import library_versions
from ..distributed import Processes
from ..memory import peak_memory
from ..model import as_pruned, attach, check_model, make_report, quantised_report, record_settings, settings_of
from ..plan import run
from .loading import Source, open_checkpoint
from .place import DiskPlace
from .workspace import Workspace

logger = logging.get_logger(__name__)


@dataclass
class CheckpointRun:
    """One call of `prune_checkpoint`, after its arguments have been checked. `base_card` says what the card of the
    dense model says of its license and language."""

    source: Source
    config: SparsityConfig
    workspace: Workspace
    processes: Processes
    device: torch.device
    activation_memory: int
    base_card: Callable[[PreTrainedModel], dict[str, Any]]

    def execute(self, resume: bool, overwrite: bool) -> SparsityReport:
        """Goes on with an unfinished run, or begins; gives the report of the finished checkpoint."""
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
            asked = settings_of(as_pruned(self.config, self.source.made))
            finished = _finished_report(self.workspace, self.source.files.sha256(), asked, overwrite)
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
        folder, space = workspace.folder(f"offload-{processes.rank}"), self.source.files.num_bytes * processes.size
        model, disk = open_checkpoint(self.source, self.device, folder, space)
        check_model(model, config)
        place = DiskPlace(
            model=model,
            blocks=disk.blocks,
            processes=processes,
            tokenizer=lambda: load_tokenizer(config.calibration, self.source.path, **self.source.loading),
            disk=disk,
            config=config,
            workspace=workspace,
            activation_memory=self.activation_memory,
        )
        job = run(place, config)
        self.config = job.config  # with the pattern that was found, where one was
        report, made = make_report(job), self.source.made
        if made is not None:
            self.config = as_pruned(self.config, made)
            if self.source.report is not None:
                report = quantised_report(report, self.source.report, self.config)
        processes.once(lambda: self._finish(place, report))

    def _finish(self, place: DiskPlace, report: SparsityReport) -> None:
        model, disk = place.model, place.disk
        attach(model, record_settings(self.config))
        if self.source.report is None:
            subfolder = self.source.loading.get("subfolder")
            report.base_arguments = {"subfolder": subfolder} if subfolder else {}
            report.base_card = self.base_card(model)
        self.source.files.check()
        report.source_fingerprint = self.source.files.sha256()
        blocks = zip(disk.blocks.blocks, self.workspace.journal.blocks, strict=True)
        pairs = (zip(block.modules(), done.digests, strict=True) for block, done in blocks)
        report.fingerprint = fingerprint(model, dict(itertools.chain.from_iterable(pairs)))
        place.note_costs([peak_memory()])
        report.seconds = round(self.workspace.journal.seconds, 2)
        report.peak_memory_bytes = self.workspace.journal.peak_memory_bytes
        facts_of(model).report = report
        self.workspace.finish(model, disk, self._save_tokenizer)

    def _save_tokenizer(self, folder: Path) -> None:
        if (error := save_tokenizer(self.source.path, folder, **self.source.loading)) is not None:
            reason = " ".join(str(error).split())
            logger.warning(f"The checkpoint has no tokenizer: none could be loaded from {self.source.path}: {reason}")


def _finished_report(
    workspace: Workspace, source_sha256: str, asked: dict[str, Any], overwrite: bool
) -> SparsityReport | None:
    """The report of a checkpoint that the same job, which was `asked` for, has made already; None where there is none,
    or another job's may be replaced.

    Raises:
        FileExistsError: the folder holds a checkpoint that another job made, and may not be replaced.
        ValueError: a weight file of the checkpoint is missing, truncated or changed.
    """
    if not (workspace.output / REPORT_NAME).is_file():
        return None
    report = SparsityReport.load(workspace.output / REPORT_NAME)
    values, _ = PreTrainedConfig.get_config_dict(workspace.output)
    job = workspace.journal.job
    if METHODS[job["settings"]["method"]].recognise is not None:  # then the report has the pattern found
        asked = {**asked, "pattern": report.config["pattern"]}
    same_dtype = job["dtype"] in ("auto", values.get("dtype"))
    same_storage = (recorded_settings(values) or asked)["storage"] == asked["storage"]  # it may have been saved anew
    if report.source_fingerprint == source_sha256 and report.config == asked and same_dtype and same_storage:
        try:
            find_weight_files(workspace.output)
            if changed := changed_files(workspace.output):
                raise ValueError(f"{', '.join(changed[:3])} changed since")
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
