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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch

from ...checkpoint.staging import write_text
from ...records import As, Count, Positive, read_record, to_json
from ...version import library_versions

RESULTS_NAME = "results.json"


class _Row(TypedDict):
    shape: list[Positive]
    tokens: Positive
    dtype: str
    pattern: str
    kernel: str
    dense_us: float
    sparse_us: float
    speedup: float
    dense_bytes: Count
    speed_us: float


@dataclass
class BenchResults:
    """See the table above."""

    hardware: dict[str, Any]
    versions: dict[str, str]
    rows: list[Annotated[dict[str, Any], As(_Row, is_open=True)]] = field(default_factory=list)
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
        found: BenchResults = read_record(cls, path, "holds no results of the benchmark")
        return found

    def chosen(self) -> list[dict[str, Any]]:
        """The rows of the kernels that the dispatch takes."""
        return [row for row in self.rows if row.get("chosen")]

    def __str__(self) -> str:
        """Tables of what the dispatch takes, and of the models."""
        lines = [", ".join(str(value) for value in self.hardware.values())]
        if self.rows:
            columns = (
                "shape",
                "pattern",
                "dtype",
                "tokens",
                "dense us",
                "sparse us",
                "speed-up",
                "speed mode",
                "kernel",
            )
            lines += ["", *_aligned([columns, *map(_layer_cells, self.chosen())])]
        if self.models:
            head = ("model", "pattern", "dtype", "batch", "phase", "dense tokens/s", "sparse tokens/s", "speed-up")
            cells = [_model_cells(row, phase) for row in self.models for phase in ("prefill", "decode")]
            lines += ["", *_aligned([head, *cells])]
        return "\n".join(lines)


def _layer_cells(row: dict[str, Any]) -> tuple[str, ...]:
    shape, tokens = f"{row['shape'][0]} x {row['shape'][1]}", str(row["tokens"])
    times = f"{row['dense_us']:.1f}", f"{row['sparse_us']:.1f}", f"{row['speedup']:.2f}"
    return (
        shape,
        row["pattern"],
        row["dtype"],
        tokens,
        *times,
        f"{row['dense_us'] / row['speed_us']:.2f}",
        row["kernel"],
    )


def _model_cells(row: dict[str, Any], phase: str) -> tuple[str, ...]:
    rates = [f"{row[f'{kind}_{phase}_tokens_per_s']:.1f}" for kind in ("dense", "sparse")]
    ratio = f"{row[f'{phase}_speedup']:.2f}"
    return row["model"], row["pattern"], row["dtype"], str(row["batch"]), phase, *rates, ratio


def _aligned(table: list[Any]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]


def _hardware(device: torch.device) -> dict[str, Any]:
    """The GPU with its driver, or the processor; no name of this machine."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": _driver(),
        }
    return {"device": _processor(), "threads": torch.get_num_threads()}


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    words = text.splitlines()[0].split()
    return next((word for word in words if word[:1].isdigit() and "." in word), None)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
