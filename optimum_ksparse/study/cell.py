"""One cell, in a process of its own, in a folder that holds `job.json`.

What the cell comes to is `result.json`, written whole or not at all. A cell that was cut off goes on from what lies in
its folder: a pruned checkpoint, results, a tuning.
"""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers.utils import CONFIG_NAME

from ..api import prune_checkpoint
from ..checkpoint import facts_of
from ..checkpoint.model_class import load_model
from ..checkpoint.staging import write_text
from ..data import read_tokenizer
from ..evaluation import EvaluationProtocol, EvaluationResults, Measurement, evaluate_model, read_tuning
from ..kernels import GROUPS
from ..kernels.hardware import runs_kernels
from ..nn import densified
from ..pruning.memory import peak_memory
from ..records import REPORT_NAME, RESULTS_NAME, read_record, to_json
from ..report import SparsityReport
from ..runtime import RuntimeConfig, configure
from ..version import library_versions
from .benchmark import BenchResults
from .finetuning import FinetuningSettings, KoAlpacaSettings, KorQuADSettings
from .grid import split_settings
from .processes import end_with_parent
from .recipe import SECTIONS, nsmc_protocol
from .results import FAILURE_NAME, RESULT_NAME, CellResult, summary_of

JOB_NAME = "job.json"
_CHECKPOINT = "checkpoint"
_TUNINGS = {"korquad": "korquad", "nsmc": "koalpaca"}  # section of the recipe → folder of its tuning
# Parts of a job by which nothing that lies in the folder becomes another.
_FREE = ("evaluation", *_TUNINGS, "processes", "keep_checkpoints", "study")
_LOADING = ("dtype", "device_map", "revision", "trust_remote_code")  # of the dense model
# What a cell is told of the recipe. Its paths are this machine's; the job goes with the end of the cell.
TOLD = (*_LOADING, *SECTIONS, "model", "stream", "keep_checkpoints", "processes")
T = TypeVar("T")
_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "lm-eval", "peft")


def prepare_cell(folder: Path, job: dict[str, Any]) -> None:
    """Writes the job of a cell. What an unfinished one has begun with other settings goes: it would go on with them.
    Results say themselves what they are of."""
    folder.mkdir(parents=True, exist_ok=True)
    path, job = folder / JOB_NAME, json.loads(json.dumps(job))
    earlier = read_record(dict[str, Any], path, "is damaged") if path.is_file() else job
    changed = any(earlier.get(name) != job[name] for name in job.keys() - _FREE)
    changed |= earlier["study"]["weights"] != job["study"]["weights"]
    gone = [name for section, name in _TUNINGS.items() if changed or earlier.get(section) != job[section]]
    for name in [*gone, *([_CHECKPOINT] if changed else [])]:
        shutil.rmtree(folder / name, ignore_errors=True)
    write_text(path, to_json(job))


def clean_cell(folder: Path, keep_checkpoints: bool) -> None:
    """Removes what a finished cell does not need any more; its job last, so that a later call can end what was cut
    off."""
    for path in [] if keep_checkpoints else folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
    for name in (FAILURE_NAME, RESULTS_NAME, JOB_NAME):
        (folder / name).unlink(missing_ok=True)


def run_cell(folder: Path) -> None:
    """Does what `job.json` in a folder says."""
    _Run(folder).execute()


class _Run:
    """The stages of a cell. Each loads what it needs, and leaves the memory to the next."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkpoint = folder, folder / _CHECKPOINT
        self.job: dict[str, Any] = read_record(dict[str, Any], folder / JOB_NAME, "is damaged")
        self.settings: dict[str, Any] | None = self.job["settings"]
        self.loading = {name: self.job[name] for name in _LOADING if self.job[name] is not None}
        self.seconds: dict[str, float] = {}
        self.device = torch.device("cpu")
        self.during_stage = ExitStack()

    def execute(self) -> None:
        pruning = None if self.settings is None else self._stage("pruning", self._prune)
        tasks = {"evaluation": self._evaluate, "korquad": self._korquad, "nsmc": self._nsmc}
        rows = [self._stage(name, task) for name, task in tasks.items() if self.job[name] is not None]
        shared = {"cells at once": self.job["processes"]} if self.job["processes"] > 1 else {}
        result = CellResult(
            id=self.job["id"],
            identity=self.job["identity"],
            measurements=list(itertools.chain(*rows)),
            pruning=pruning,
            seconds=self.seconds,
            peak_memory_bytes=peak_memory(),
            hardware={**BenchResults.here(self.device).hardware, **shared},
            versions=library_versions(*_LIBRARIES),
        )
        write_text(self.folder / RESULT_NAME, to_json(result, indent=1))
        clean_cell(self.folder, self.job["keep_checkpoints"])

    def _stage(self, name: str, task: Callable[[], T]) -> T:
        started = time.perf_counter()
        with self.during_stage:
            outcome = task()
        gc.collect()
        torch.cuda.empty_cache()
        self.seconds[name] = round(time.perf_counter() - started, 2)
        return outcome

    def _prune(self) -> dict[str, Any]:
        assert self.settings is not None
        if not (self.checkpoint / CONFIG_NAME).is_file():
            config, _ = split_settings(self.settings)
            source, loading = self.job["model"], dict(self.loading)
            if self.job["stream"]:
                loading.pop("device_map", None)
                prune_checkpoint(source, self.checkpoint, config, **loading)
            else:
                shutil.rmtree(self.checkpoint, ignore_errors=True)
                load_model(source, **loading, sparsity_config=config).save_pretrained(self.checkpoint)
        report = SparsityReport.load(self.checkpoint / REPORT_NAME)
        names = ("seconds", "peak_memory_bytes", "calibration")
        return {**{name: getattr(report, name) for name in names}, "report": summary_of(report)}

    def _evaluate(self) -> list[Measurement]:
        model, tokenizer = self._load()
        return self._measure(model, tokenizer, EvaluationProtocol.from_settings(self.job["evaluation"]), self.folder)

    def _korquad(self) -> list[Measurement]:
        """Trains an adapter and a span head, and measures them."""
        folder = self.folder / _TUNINGS["korquad"]
        self._finetune(KorQuADSettings(**self.job["korquad"]), folder)
        results = EvaluationResults.load(folder / RESULTS_NAME)
        return [row for row in [*results.sparse, *results.dense] if row.tuning is not None]

    def _nsmc(self) -> list[Measurement]:
        """Tunes on KoAlpaca, and measures NSMC."""
        folder = self.folder / _TUNINGS["nsmc"]
        self._finetune(KoAlpacaSettings(**self.job["nsmc"]["koalpaca"]), folder)
        model, tokenizer = load_model(folder, **self._how()), read_tokenizer(str(folder))
        facts_of(model).tuning = read_tuning(folder)
        return self._measure(model, tokenizer, nsmc_protocol(self.job["nsmc"]), folder)

    def _finetune(self, settings: FinetuningSettings, folder: Path) -> None:
        from .finetuning.run import finetune  # needs PEFT

        finetune(*self._load(), settings, folder)

    def _load(self) -> tuple[Any, Any]:
        """The dense or the pruned model, and its tokenizer."""
        model = load_model(self.job["model"] if self.settings is None else self.checkpoint, **self._how())
        self.device = model.device
        how = {name: self.loading[name] for name in ("revision", "trust_remote_code") if name in self.loading}
        return model, read_tokenizer(self.job["model"], **how)

    def _how(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`; a pruned checkpoint has the dtype already, and no revision."""
        if self.settings is None:
            return self.loading
        return {name: self.loading[name] for name in ("device_map", "trust_remote_code") if name in self.loading}

    def _measure(self, model: Any, tokenizer: Any, protocol: EvaluationProtocol, folder: Path) -> list[Measurement]:
        """Goes on with the results in a folder. Sparse layers run as the settings say; where these name no kernel, and
        there are none for them, they are dense meanwhile, instead of being decompressed in each forward pass."""
        if self.settings is not None:
            config = RuntimeConfig(**split_settings(self.settings)[1])
            configure(model, config)
            kernels = runs_kernels(model.device) and model.dtype in (torch.bfloat16, torch.float16)
            if config.kernel == "auto" and not (kernels and self.settings["pattern"] in GROUPS):
                self.during_stage.enter_context(densified(model))
        if (folder / RESULTS_NAME).is_file():
            facts_of(model).results = EvaluationResults.load(folder / RESULTS_NAME)
        results = evaluate_model(model, tokenizer, protocol, on_measured=lambda results: results.save(folder))
        return [*results.sparse, *results.dense]


def main() -> None:
    """The process of a cell, whose folder is its argument."""
    end_with_parent()
    run_cell(Path(sys.argv[1]))
