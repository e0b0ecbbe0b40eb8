"""What was measured, as `results.json`.

| key | meaning |
|---|---|
| hardware, versions | on what |
| rows | a row for each product and kernel, made by `layers` |
| models | a row for each whole model, made by `models` |
"""

from __future__ import annotations

import itertools
import math
import os
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.staging import write_text
from ...evaluation.running import machine
from ...hub.figures import new_figure, save_figure
from ...records import aligned, read_record, to_json
from ...version import library_versions

RESULTS_NAME, FIGURE_NAME = "results.json", "speedup.png"


@dataclass
class BenchResults:
    """See the table above."""

    hardware: dict[str, Any]
    versions: dict[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def here(cls, device: torch.device) -> BenchResults:
        """Empty results of this machine: its GPU with the driver, or the processor; no name of it."""
        versions = library_versions("torch", "triton", "transformers")
        if device.type != "cuda":
            here = machine(device)
            return cls({"device": here["machine"], "threads": here["threads"]}, versions)
        properties = torch.cuda.get_device_properties(device)
        hardware = {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": _first(r"Kernel Module.*?\s(\d+\.[\d.]+)", "/proc/driver/nvidia/version"),
        }
        return cls(hardware, {**versions, "cuda": str(torch.version.cuda)})

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `results.json`, whole or not at all."""
        path = Path(folder) / RESULTS_NAME
        write_text(path, to_json(self, indent=1))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BenchResults:
        """Reads results. Raises ValueError, naming the file, where it holds none."""
        return read_record(cls, path, "holds no results of the benchmark")

    def chosen(self) -> list[dict[str, Any]]:
        """The rows of the kernels that the dispatch takes."""
        return [row for row in self.rows if row.get("chosen")]

    def __str__(self) -> str:
        """Tables of what the dispatch takes, and of the models."""
        lines = [", ".join(str(value) for value in self.hardware.values())]
        if self.rows:
            table = [["shape", "pattern", "dtype", "tokens", "dense us", "sparse us", "speed-up", "kernel"]]
            for row in self.chosen():
                numbers = [f"{row['dense_us']:.1f}", f"{row['sparse_us']:.1f}", f"{row['speedup']:.2f}"]
                what = [" x ".join(map(str, row["shape"])), *weights_of(row), str(row["tokens"])]
                table.append([*what, *numbers, row["kernel"]])
            lines += ["", *aligned(table)]
        if self.models:
            table = [["model", "pattern", "dtype", "batch", "phase", "dense tokens/s", "sparse tokens/s", "speed-up"]]
            for row, phase in itertools.product(self.models, ("prefill", "decode")):
                rates = [f"{row[f'{kind}_{phase}_tokens_per_s']:.1f}" for kind in ("dense", "sparse")]
                what = [row["model"], *weights_of(row), str(row["batch"]), phase]
                table.append([*what, *rates, f"{row[f'{phase}_speedup']:.2f}"])
            lines += ["", *aligned(table)]
        return "\n".join(lines)


def weights_of(row: dict[str, Any]) -> tuple[str, str]:
    """The pattern of the weights that a row is of, and their dtype, with the type of quantised values before it."""
    return row["pattern"], " ".join(filter(None, (row.get("values"), row["dtype"])))


def _first(pattern: str, path: str) -> str | None:
    """What a pattern finds first in a file of the system."""
    try:
        match = re.search(pattern, Path(path).read_text(encoding="utf-8"))
    except OSError:
        return None
    return match and match[1].strip()


def draw_speedup(results: BenchResults, path: Path) -> bool:
    """Draws the speed-up of what the dispatch takes: a panel for each of `weights_of`, a line for each shape, and
    the limit of a product that is bound by memory. False, and nothing written, without matplotlib or rows."""
    rows = results.chosen()
    panels = sorted({weights_of(row) for row in rows})
    shapes = sorted({tuple(row["shape"]) for row in rows}, key=lambda shape: (-shape[0] * shape[1], shape))
    if not rows or find_spec("matplotlib") is None:
        return False
    figure = new_figure(2 + 5 * len(panels))
    most = 0.0
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        most = max(most, _draw_panel(axes, [row for row in rows if weights_of(row) == panel], shapes))
        axes.set_title(" ".join(panel), fontsize=10)
    figure.axes[0].set_ylim(0, 1.15 * most)  # of all: they share it
    figure.suptitle(f"Speed of sparse layers beside dense ones, {results.hardware['device']}", fontsize=11)
    how = {"loc": "outside right upper", "fontsize": 8, "frameon": False, "title": "out x in"}
    figure.legend(*figure.axes[0].get_legend_handles_labels(), **how)
    save_figure(figure, path)
    return True


def _draw_panel(axes: Any, rows: list[dict[str, Any]], shapes: list[Any]) -> float:
    """Draws rows of one pattern and dtype; the greatest speed-up that is drawn."""
    tokens = sorted({row["tokens"] for row in rows})
    for shape in shapes:
        points = sorted((row["tokens"], row["speedup"]) for row in rows if tuple(row["shape"]) == shape)
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            marker="o",
            markersize=4,
            linewidth=1.4,
            label=f"{shape[0]} x {shape[1]}",
        )
    # The bytes of the narrowest dense rival over those of the packed weight.
    width = min(getattr(torch, dtype).itemsize for dtype in rows[0]["rivals_us"])
    limit = width * math.prod(rows[0]["shape"]) / rows[0]["packed_bytes"]
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axhline(limit, color="black", linewidth=0.8, linestyle="--")
    axes.annotate(f"limit of memory {limit:.2f}", (tokens[-1], limit), ha="right", va="bottom", fontsize=8)
    axes.annotate("dense", (tokens[-1], 1), ha="right", va="bottom", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(number) for number in tokens], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("tokens in a product")
    axes.set_ylabel("speed-up over the fastest F.linear")
    axes.grid(alpha=0.3)
    return max(limit, *(row["speedup"] for row in rows))
