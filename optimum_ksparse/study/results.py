"""What came of a study: results by cell, read from its folder in one place."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

from ..evaluation import Measurement
from ..records import Amount, As, Count, Share, build, read_record
from .files import CELLS, FAILURE_NAME, RESULT_NAME, write_json
from .quantities import QUANTITIES, figures_of
from .record import Record
from .spread import Spread, spread


class _Found(TypedDict, total=False):
    choice: str
    dropped_blocks: list[Count]


class _Summary(_Found):
    density: Share
    mean_output_error: Amount | None


class _Pruning(TypedDict):
    seconds: Amount
    peak_memory_bytes: dict[str, Count]
    report: Annotated[dict[str, Any], As(_Summary, is_open=True)]


@dataclass
class CellResult:
    """What came of a cell.

    Attributes:
        id, identity: of the cell.
        measurements: rows as `EvaluationResults` holds them.
        pruning: `seconds`, `peak_memory_bytes`, `calibration` and a summary of the `report`; None for the dense model.
        seconds: of each stage, in the process that ended it.
        peak_memory_bytes: of the process that ended the cell. hardware, versions: what it ran on.
    """

    id: str
    identity: dict[str, Any]
    measurements: list[dict[str, Any]]
    pruning: Annotated[dict[str, Any], As(_Pruning, is_open=True)] | None
    seconds: dict[str, Amount]
    peak_memory_bytes: dict[str, Count]
    hardware: dict[str, Any]
    versions: dict[str, str]

    def save(self, folder: Path) -> None:
        """Writes `result.json`, whole or not at all."""
        write_json(folder / RESULT_NAME, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> CellResult:
        """Raises ValueError where the file is damaged."""
        what = f"of cell {folder.name} is damaged"
        return read_record(cls, folder / RESULT_NAME, what, "; delete it, and the cell runs again")

    def check_record(self, where: str) -> None:
        """Raises ValueError where a row from a file is not what its kind of measurement has."""
        build(list[Measurement], self.measurements, "measurements")

    def figures(self) -> dict[str, float]:
        """By the keys of `QUANTITIES`, in the units of the tables."""
        return figures_of([Measurement(**row) for row in self.measurements], self.pruning)


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


@dataclass
class StudyResults:
    """A study as far as it is done.

    Attributes:
        record: what was asked for.
        cells: id → result, of the cells in the recipe that are done.
        failed: id → what is known of a failed one: `status`, `log` (its last lines).
        left_out: ids of finished cells that are not in the recipe (any more).
    """

    record: Record
    cells: dict[str, CellResult]
    failed: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def unfinished(self) -> list[str]:
        """Ids of cells that are not done, failed ones among them."""
        return [cell for cell in self.record.cells if cell not in self.cells]

    def title(self, cell: str) -> str:
        """What messages call a cell."""
        return str(self.record.places(cell)[0])

    def identity_of(self, method: str) -> dict[str, Any]:
        """The settings of a method: those of a cell in which it prunes, where there is one; its name alone, where no
        cell has it."""
        found = [
            content["identity"]
            for cell, content in self.record.cells.items()
            if any(place.method == method for place in self.record.places(cell))
        ]
        pruned = [identity for identity in found if identity.get("pattern") != "none"]  # of earlier versions
        return {"method": method, **next(iter(pruned or found), {})}

    def _order(self, method: str, calibration: str | None, pattern: str) -> tuple[int, ...]:
        """By which rows are sorted: the places in the recipe, the dense model first."""
        where = (("methods", method), ("calibration", calibration), ("patterns", pattern))
        return tuple(names.index(name) if name in (names := self.record.grid[part]) else -1 for part, name in where)

    def rows(self) -> list[Row]:
        """Each figure over the seeds, in the order of `QUANTITIES` and of the recipe."""
        grouped: dict[tuple[str, str | None, str], list[str]] = {}
        for cell in self.record.cells:
            for place in self.record.places(cell):
                grouped.setdefault((place.method, place.calibration, place.pattern), []).append(cell)
        grouped = dict(sorted(grouped.items(), key=lambda item: self._order(*item[0])))
        figures = {cell: result.figures() for cell, result in self.cells.items()}
        rows = []
        for quantity in QUANTITIES:
            for (method, calibration, pattern), cells in grouped.items():
                known = [figures[cell][quantity] for cell in cells if quantity in figures.get(cell, {})]
                if known:
                    rows.append(Row(quantity, method, calibration, pattern, spread(known), len(cells)))
        return rows


def load_study(folder: str | os.PathLike[str]) -> StudyResults:
    """Reads what a study has come to so far.

    Raises:
        FileNotFoundError: the folder holds no study.
        ValueError: a file in it is damaged.
    """
    folder = Path(folder)
    record = Record.load(folder)
    if record is None:
        raise FileNotFoundError(f"{folder} holds no study: run one with optimum-cli ksparse study RECIPE")
    return read_cells(record, folder)


def read_cells(record: Record, folder: Path) -> StudyResults:
    """The cells that a folder holds, of a study that `record` describes."""
    results = StudyResults(record, {})
    for cell in record.cells:
        place = folder / CELLS / cell
        if (place / RESULT_NAME).is_file():
            results.cells[cell] = CellResult.load(place)
        elif (place / FAILURE_NAME).is_file():
            results.failed[cell] = read_record(dict[str, Any], place / FAILURE_NAME, f"of cell {cell} is damaged")
    others = (path.parent.name for path in (folder / CELLS).glob(f"*/{RESULT_NAME}"))
    results.left_out = sorted(name for name in others if name not in record.cells)
    return results
