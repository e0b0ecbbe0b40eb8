"""One cell, in a process of its own: `python -m optimum_ksparse.study.cell FOLDER`, where FOLDER holds `job.json`.

What the cell comes to is `result.json`, written whole or not at all. A cell that was cut off goes on: what is done
stands in `stages.json`, what was measured in `evaluation_results.json`.
"""

from __future__ import annotations

import gc
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from transformers.utils import CONFIG_NAME

from ..api import prune_checkpoint
from ..checkpoint import facts_of
from ..checkpoint.model_class import class_for_source
from ..config import EXECUTION_SETTINGS, SparsityConfig
from ..data import read_tokenizer
from ..evaluation import EvaluationProtocol, EvaluationResults, evaluate_model
from ..kernels import GROUPS
from ..kernels.hardware import runs_kernels
from ..pruning.memory import peak_memory
from ..records import RESULTS_NAME, read_record
from ..report import SparsityReport
from ..runtime.execution import apply_settings
from ..version import library_versions
from .benchmark import BenchResults
from .files import JOB_NAME, KOALPACA, KORQUAD, STAGES_NAME, clean_cell, read_stages, write_json
from .lifeline import end_with_parent
from .results import CellResult
from .tuning import run_korquad, run_nsmc

_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "lm-eval", "peft")


def run_cell(folder: Path) -> None:
    """Does what `job.json` in a folder says."""
    _Run(folder)()


class _Run:
    """The stages of a cell. Each loads what it needs, and leaves the memory to the next."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job: dict[str, Any] = read_record(dict[str, Any], folder / JOB_NAME, "is damaged")
        self.settings: dict[str, Any] | None = self.job["settings"]
        self.checkpoint = folder / "checkpoint"
        self.stages = read_stages(folder)
        self.loading = {name: value for name, value in self.job["loading"].items() if value is not None}
        self.device = torch.device("cpu")

    def __call__(self) -> None:
        sparse = self.settings is not None
        if sparse:
            if not (self.checkpoint / CONFIG_NAME).is_file():
                self.stages.pop("pruning", None)
            self._stage("pruning", self._prune)
        tasks = {"measuring": self._measure, "korquad": self._korquad, "nsmc": self._nsmc}
        measured = {name: task for name, task in tasks.items() if self.job[name] is not None}
        for name, task in measured.items():
            self._stage(name, task)
        result = CellResult(
            id=self.job["id"],
            identity=self.job["identity"],
            measurements=[row for name in measured for row in self.stages[name]["rows"]],
            pruning=self.stages.get("pruning"),
            seconds={name: self.stages[name]["seconds"] for name in self.stages},
            peak_memory_bytes=peak_memory(),
            hardware=self._hardware(),
            versions=library_versions(*_LIBRARIES),
        )
        result.save(self.folder)
        clean_cell(self.folder, self.job["keep_checkpoints"])

    def _hardware(self) -> dict[str, Any]:
        """Of the device that models ran on; with the number of cells that shared the machine."""
        shared = {"cells at once": self.job["processes"]} if self.job["processes"] > 1 else {}
        return {**BenchResults.here(self.device).hardware, **shared}

    def _stage(self, name: str, task: Callable[[], dict[str, Any]]) -> None:
        if name in self.stages:
            return
        started = time.perf_counter()
        done = task()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.stages[name] = {"seconds": round(time.perf_counter() - started, 2), **done}
        write_json(self.folder / STAGES_NAME, self.stages)

    def _prune(self) -> dict[str, Any]:
        assert self.settings is not None
        config = SparsityConfig(**self.settings)
        source, loading = self.job["model"], dict(self.loading)
        if self.job["stream"]:
            loading.pop("device_map", None)
            report = prune_checkpoint(source, self.checkpoint, config, **loading)
        else:
            shutil.rmtree(self.checkpoint, ignore_errors=True)
            loader = class_for_source(source, **loading)
            model = loader.from_pretrained(source, sparsity_config=config, **loading)
            model.save_pretrained(self.checkpoint)
            report = cast(SparsityReport, model.sparsity_report)
        return {
            "seconds": report.seconds,
            "peak_memory_bytes": report.peak_memory_bytes,
            "calibration": report.calibration,
            "report": _summary(report),
        }

    def _measure(self) -> dict[str, Any]:
        model, tokenizer = self._load(measure=True)
        if (self.folder / RESULTS_NAME).is_file():
            facts_of(model).results = EvaluationResults.load(self.folder / RESULTS_NAME)
        protocol = EvaluationProtocol.from_settings(self.job["measuring"])
        found = evaluate_model(model, tokenizer, protocol, on_measured=lambda results: results.save(self.folder))
        return {"rows": [asdict(row) for row in (*found.sparse, *found.dense)]}

    def _korquad(self) -> dict[str, Any]:
        return {"rows": run_korquad(self._load, self.job["korquad"], self.folder / KORQUAD)}

    def _nsmc(self) -> dict[str, Any]:
        rows = run_nsmc(self._load, self._load_tuned, self.job["nsmc"], self.folder / KOALPACA)
        return {"rows": rows}

    def _load(self, measure: bool = False) -> tuple[Any, Any]:
        """The dense or the pruned model, and its tokenizer; for measuring with its execution settings."""
        source = self.job["model"] if self.settings is None else self.checkpoint
        how = self._how()
        model = class_for_source(source, **how).from_pretrained(source, **how)
        self.device = model.device
        if measure:
            self._speed_up(model)
        return model, self._tokenizer()

    def _load_tuned(self, folder: Path) -> tuple[Any, Any]:
        how = self._how()
        model = class_for_source(folder, **how).from_pretrained(folder, **how)
        self._speed_up(model)
        return model, read_tokenizer(str(folder))

    def _how(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`; a pruned checkpoint has the dtype already, and no revision."""
        if self.settings is None:
            return self.loading
        kept = {name: self.loading[name] for name in ("device_map", "trust_remote_code") if name in self.loading}
        return {"dtype": "auto", **kept}

    def _tokenizer(self) -> Any:
        names = ("revision", "trust_remote_code")
        return read_tokenizer(
            self.job["model"], **{name: self.loading[name] for name in names if name in self.loading}
        )

    def _speed_up(self, model: Any) -> None:
        """Sparse layers run as the settings say; where there are no kernels for them they are dense from their first
        forward pass on, instead of being decompressed in each."""
        if self.settings is None:
            return
        kernels = runs_kernels(model.device) and model.dtype in (torch.bfloat16, torch.float16)
        how: dict[str, Any] = {"densify": "never" if kernels and self.settings["pattern"] in GROUPS else "lazy"}
        how |= {name: self.settings[name] for name in EXECUTION_SETTINGS if name in self.settings}
        apply_settings(model, SparsityConfig("magnitude", dataset=None, **how))


def _summary(report: SparsityReport) -> dict[str, Any]:
    errors = [row.relative_output_error for row in report.layers if row.relative_output_error is not None]
    more: dict[str, Any] = {}
    if report.choice is not None:
        more["choice"] = report.method
    if report.reconstruction_losses is not None:
        before, after = report.reconstruction_losses
        more["reconstruction"] = {"loss_before": before, "loss_after": after}
        more["reconstruction"]["notes"] = [f"{row.block}: {row.note}" for row in report.reconstruction if row.note]
    return {
        **more,
        "density": report.density,
        "packed_ratio": report.packed_ratio,
        "mean_output_error": sum(errors) / len(errors) if errors else None,
        "num_layers": len(report.layers),
        "skipped": list(report.skipped),
        "notes": list(dict.fromkeys(row.note for row in report.layers if row.note)),
    }


if __name__ == "__main__":
    end_with_parent()
    run_cell(Path(sys.argv[1]))
