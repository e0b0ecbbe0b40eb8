"""What came of a study: results by cell, read from its folder in one place.

| path | what |
|---|---|
| `study.json` | what was asked for (`Record`) |
| `tables.md`, `results.json`, `*.png` | what came of it |
| `cells/<id>/result.json` | a finished cell (`CellResult`) |
| `cells/<id>/failure.json`, `log.txt` | how one failed, and what it said |
| `cells/<id>/job.json`, `checkpoint/`, … | what one that was cut off goes on from |
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

from ..evaluation import Measurement
from ..quantization import groups_of_row
from ..records import Amount, As, Count, Share, read_record
from ..report import SparsityReport
from .quantities import BITS, QUANTITIES, Spread, figures_of, spread
from .record import Record
from .tables import html

CELLS = "cells"
RESULT_NAME, FAILURE_NAME = "result.json", "failure.json"


class _Summary(TypedDict):
    density: Share
    mean_output_error: Amount | None


class _Pruning(TypedDict):
    seconds: Amount
    peak_memory_bytes: dict[str, Count]
    report: Annotated[dict[str, Any], As(_Summary, is_open=True)]


@dataclass
class CellResult:
    """What came of a cell: its rows as `EvaluationResults` holds them; of its pruning (None for the dense model)
    `seconds`, `peak_memory_bytes`, `calibration` and a summary of the `report`; and of the process that ended it the
    seconds of each stage, its memory, and what it ran on."""

    id: str
    identity: dict[str, Any]
    measurements: list[Measurement]
    pruning: Annotated[dict[str, Any], As(_Pruning, is_open=True)] | None
    seconds: dict[str, Amount]
    peak_memory_bytes: dict[str, Count]
    hardware: dict[str, Any]
    versions: dict[str, str]

    @property
    def figures(self) -> dict[str, float]:
        """Figures by the keys of `QUANTITIES`, in the units of the tables."""
        return figures_of(self.measurements, self.pruning)


def _bits_per_weight(report: SparsityReport) -> float:
    """Bits for each weight of the sparse layers, masks and scales included; a float counts as 16 bits, whatever dtype
    a study computes in."""
    values, group_size = (report.config.get(name) for name in ("values", "group_size"))
    bits = 8 * report.packed_bytes
    for layer in report.layers:
        rows, columns = layer.shape
        floats = layer.num_values
        if values is not None and group_size is not None:
            floats = rows * groups_of_row(group_size, columns)
        bits -= floats * (8 * layer.dense_bytes // (rows * columns) - 16)
    return bits / max(1, report.num_weights)


def summary_of(report: SparsityReport) -> dict[str, Any]:
    """What a cell keeps of the report of its pruning."""
    errors = [row.relative_output_error for row in report.layers if row.relative_output_error is not None]
    more: dict[str, Any] = {}
    if (losses := report.reconstruction_losses) is not None:
        notes = [f"{row.block}: {row.note}" for row in report.reconstruction if row.note]
        more["reconstruction"] = {"loss_before": losses[0], "loss_after": losses[1], "notes": notes}
    return {
        **more,
        "density": report.density,
        "packed_ratio": report.packed_ratio,
        BITS: _bits_per_weight(report),
        "mean_output_error": sum(errors) / len(errors) if errors else None,
        "num_layers": len(report.layers),
        "skipped": list(report.skipped),
        "notes": list(dict.fromkeys(row.note for row in report.layers if row.note)),
    }


@dataclass(frozen=True)
class Row:
    """A figure of a method at a pattern: `pattern` is "dense" for the dense model, whose `method` is that too;
    `calibration` is None where no data are read. `expected` is the number of cells that the recipe has for it."""

    quantity: str
    method: str
    calibration: str | None
    pattern: str
    spread: Spread
    expected: int

    @property
    def place(self) -> tuple[str, str | None, str]:
        """Whose figure it is."""
        return self.method, self.calibration, self.pattern


@dataclass
class StudyResults:
    """A study as far as it is done: what was asked for, and by id the results of the cells that are done, and what is
    known of the failed ones (`status`, and `log`, its last lines)."""

    record: Record
    cells: dict[str, CellResult]
    failed: dict[str, dict[str, Any]] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        return html(self)

    def titles(self, cells: Any) -> list[str]:
        """What messages call cells."""
        return [str(self.record.cells[cell]) for cell in cells]

    def identity_of(self, method: str) -> dict[str, Any]:
        """The settings of a method: those of its first cell; its name alone, where no cell has it."""
        cells = (c for c in self.record.cells.values() if any(place.method == method for place in c.places))
        cell = next(cells, None)
        return {"method": method, **(cell.identity if cell else {})}

    def rows(self) -> list[Row]:
        """Each figure over the seeds, in the order of `QUANTITIES` and of the recipe, the dense model first."""
        grouped: dict[tuple[str, str | None, str], list[str]] = {}
        for name, cell in self.record.cells.items():
            for place in cell.places:
                grouped.setdefault((place.method, place.calibration, place.pattern), []).append(name)
        axes = [self.record.grid[part] for part in ("methods", "calibration", "patterns")]
        ranks = [{name: rank for rank, name in enumerate(axis)} for axis in axes]
        order = sorted(grouped, key=lambda group: [r.get(name, -1) for r, name in zip(ranks, group, strict=True)])
        figures = {name: result.figures for name, result in self.cells.items()}
        rows = []
        for quantity, group in itertools.product(QUANTITIES, order):
            values = [figures[name][quantity] for name in grouped[group] if quantity in figures.get(name, {})]
            if values:
                rows.append(Row(quantity, *group, spread(values), len(grouped[group])))
        return rows


def load_study(folder: str | os.PathLike[str]) -> StudyResults:
    """Reads what a study has come to so far. Raises FileNotFoundError where the folder holds none, ValueError where a
    file in it is damaged."""
    record = Record.load(Path(folder))
    if record is None:
        raise FileNotFoundError(f"{folder} holds no study: run one with optimum-cli ksparse study RECIPE")
    return read_cells(record, Path(folder))


def read_cells(record: Record, folder: Path) -> StudyResults:
    """The cells that a folder holds, of a study that `record` describes."""
    results = StudyResults(record, {})
    for cell in record.cells:
        result, failure = (folder / CELLS / cell / name for name in (RESULT_NAME, FAILURE_NAME))
        what = f"of cell {cell} is damaged"
        if result.is_file():
            results.cells[cell] = read_record(CellResult, result, what, "; delete it, and the cell runs again")
        elif failure.is_file():
            results.failed[cell] = read_record(dict[str, Any], failure, what)
    return results
