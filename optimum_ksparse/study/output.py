"""Writing what came of a study: tables, results, figures."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoint.staging import write_text
from .figures import draw_calibration, draw_patterns, draw_time
from .files import write_json
from .quantities import QUANTITIES
from .results import Row, StudyResults
from .tables import markdown

MARKDOWN_NAME, CSV_NAME, JSON_NAME = "tables.md", "tables.csv", "results.json"
FIGURES = {
    "perplexity_by_pattern.png": draw_patterns,
    "quality_by_time.png": draw_time,
    "quality_by_calibration.png": draw_calibration,
}
_COLUMNS = ("table", "figure", "method", "calibration", "pattern", "mean", "deviation", "seeds", "published")


def write_tables(results: StudyResults, output: Path) -> None:
    """Writes `tables.md`, `tables.csv` and `results.json`."""
    rows = results.rows()
    write_text(output / MARKDOWN_NAME, markdown(results))
    write_text(output / CSV_NAME, _csv(results, rows))
    cells = [
        {
            **asdict(result),
            "places": [asdict(place) for place in results.record.places(cell)],
            "figures": {name: _finite(value) for name, value in result.figures().items()},
        }
        for cell, result in results.cells.items()
    ]
    content = {
        "study": {"job": results.record.job, "grid": results.record.grid, "published": results.record.published},
        "rows": [_json_row(results, row) for row in rows],
        "cells": cells,
        "failed": [results.title(cell) for cell in results.failed],
        "unfinished": [results.title(cell) for cell in results.unfinished],
        "not_in_the_recipe": results.left_out,
    }
    write_json(output / JSON_NAME, content)


def write_figures(results: StudyResults, output: Path) -> list[str]:
    """Draws the figures that there are data for, and gives their names; none without matplotlib."""
    drawn = []
    for name, draw in FIGURES.items():
        (output / name).unlink(missing_ok=True)
        if draw(results, output / name):
            drawn.append(name)
    return drawn


def published_value(results: StudyResults, row: Row) -> float | None:
    """What was published of a figure at a pattern, where the row is of the published method, or of the dense model."""
    published = results.record.published
    if row.pattern != "dense" and published.get("method") not in (None, row.method):
        return None
    return published.get(row.quantity, {}).get(row.pattern)


def _csv(results: StudyResults, rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        mean, deviation = row.spread.mean, row.spread.deviation
        start = (QUANTITIES[row.quantity].table or "", row.quantity, row.method, row.calibration or "", row.pattern)
        known = ("" if value is None else f"{value:.10g}" for value in (deviation, published_value(results, row)))
        shown = next(known), row.spread.count, next(known)
        writer.writerow([*start, f"{mean:.10g}", *shown])
    return text.getvalue()


def _json_row(results: StudyResults, row: Row) -> dict[str, Any]:
    values = {"mean": _finite(row.spread.mean), "deviation": row.spread.deviation, "seeds": row.spread.count}
    start = {"figure": row.quantity, "method": row.method, "calibration": row.calibration, "pattern": row.pattern}
    return {**start, **values, "published": published_value(results, row)}


def _finite(value: float) -> float | None:
    """JSON has no infinity: null."""
    return value if math.isfinite(value) else None
