"""What was measured, as `results.json`.

| key | meaning |
|---|---|
| hardware, versions | on what |
| rows | a row for each product and kernel, made by `layers` |
| models | a row for each whole model, made by `models` |
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.staging import write_text
from ...records import aligned, read_record, to_json
from ...version import library_versions

RESULTS_NAME = "results.json"


@dataclass
class BenchResults:
    """See the table above."""

    hardware: dict[str, Any]
    versions: dict[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def here(cls, device: torch.device) -> BenchResults:
        """Empty results of this machine."""
        versions = library_versions("torch", "triton", "transformers")
        if device.type == "cuda":
            versions["cuda"] = str(torch.version.cuda)
        return cls(_hardware(device), versions)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `results.json`, whole or not at all."""
        path = Path(folder) / RESULTS_NAME
        write_text(path, to_json(self, indent=1))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BenchResults:
        """Reads results. Raises ValueError, naming the file, where it holds none."""
        results: BenchResults = read_record(cls, path, "holds no results of the benchmark")
        return results

    def chosen(self) -> list[dict[str, Any]]:
        """The rows of the kernels that the dispatch takes."""
        return [row for row in self.rows if row.get("chosen")]

    def __str__(self) -> str:
        """Tables of what the dispatch takes, and of the models."""
        lines = [", ".join(str(value) for value in self.hardware.values())]
        if self.rows:
            head = ["shape", "pattern", "dtype", "tokens", "dense us", "sparse us", "speed-up", "kernel"]
            lines += ["", *aligned([head, *map(_layer_cells, self.chosen())])]
        if self.models:
            head = ["model", "pattern", "dtype", "batch", "phase", "dense tokens/s", "sparse tokens/s", "speed-up"]
            cells = [_model_cells(row, phase) for row in self.models for phase in ("prefill", "decode")]
            lines += ["", *aligned([head, *cells])]
        return "\n".join(lines)


def _layer_cells(row: dict[str, Any]) -> list[str]:
    shape = f"{row['shape'][0]} x {row['shape'][1]}"
    numbers = [f"{row['dense_us']:.1f}", f"{row['sparse_us']:.1f}", f"{row['speedup']:.2f}"]
    return [shape, row["pattern"], row["dtype"], str(row["tokens"]), *numbers, row["kernel"]]


def _model_cells(row: dict[str, Any], phase: str) -> list[str]:
    rates = [f"{row[f'{kind}_{phase}_tokens_per_s']:.1f}" for kind in ("dense", "sparse")]
    names = [row["model"], row["pattern"], row["dtype"], str(row["batch"]), phase]
    return [*names, *rates, f"{row[f'{phase}_speedup']:.2f}"]


def _hardware(device: torch.device) -> dict[str, Any]:
    """The GPU with its driver, or the processor; no name of this machine."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": _first(r"Kernel Module.*?\s(\d+\.[\d.]+)", "/proc/driver/nvidia/version"),
        }
    name = _first(r"model name\s*: (.*)", "/proc/cpuinfo") or platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads()}


def _first(pattern: str, path: str) -> str | None:
    """What a pattern finds first in a file of the system."""
    try:
        match = re.search(pattern, Path(path).read_text(encoding="utf-8"))
    except OSError:
        return None
    return match and match[1].strip()
