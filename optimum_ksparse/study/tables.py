"""The study's tables: Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoint.staging import write_text
from ..records import to_json
from .method import how_it_was_measured
from .quantities import QUANTITIES, TABLES
from .recipe import DENSE
from .results import Row, StudyResults


def write_tables(results: StudyResults, output: Path) -> None:
    """Writes `tables.md`, `tables.csv` and `results.json`, in which an infinite figure is null."""
    rows = [_record_of(results, row) for row in results.rows()]
    write_text(output / "tables.md", markdown(results))
    write_text(output / "tables.csv", _csv(rows))
    cells = [
        {**asdict(result), "places": results.record.cells[cell].places, "figures": result.figures}
        for cell, result in results.cells.items()
    ]
    content = {
        "study": {"job": results.record.job, "grid": results.record.grid, "published": results.record.published},
        "rows": rows,
        "cells": cells,
        "failed": results.titles(results.failed),
        "unfinished": results.titles(cell for cell in results.record.cells if cell not in results.cells),
    }
    write_text(output / "results.json", to_json(content, indent=1))


def _record_of(results: StudyResults, row: Row) -> dict[str, Any]:
    """A row with what was published of it: of the published method, or of the dense model."""
    published = results.record.published
    is_ours = row.pattern == DENSE or published.get("method") in (None, row.method)
    return {
        "figure": row.quantity,
        "method": row.method,
        "calibration": row.calibration,
        "pattern": row.pattern,
        "mean": row.spread.mean,
        "deviation": row.spread.deviation,
        "seeds": row.spread.count,
        "published": published.get(row.quantity, {}).get(row.pattern) if is_ours else None,
    }


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.10g}" if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()


def markdown(results: StudyResults) -> str:
    """All tables that there are figures for, and how they were measured."""
    job = results.record.job
    lines = [f"# Pruning study of {job['model']}", "", _state(results), ""]
    texts = (job.get("evaluation") or {}).get("texts") or {}
    for table, title in TABLES.items():
        rows = [row for row in results.rows() if QUANTITIES[row.quantity].table == table]
        if rows:
            title = title.format(text=texts.get("name") or texts.get("file") or "texts")
            lines += [f"## {title}", "", *_table(results, table, rows), ""]
    lines += ["## How it was measured", "", *how_it_was_measured(results)]
    return "\n".join(lines).rstrip() + "\n"


def _state(results: StudyResults) -> str:
    """What the tables hold, in sentences."""
    seeds = results.record.grid["seeds"]
    text = f"{len(results.cells)} of {len(results.record.cells)} cells are done."
    if len(seeds) > 1:
        text += (
            f" Figures are mean ± sample standard deviation over the calibration seeds {', '.join(map(str, seeds))} "
            f"(n = {len(seeds)}); what has no ± is one run, or infinite."
        )
    return text + (f" Failed: {'; '.join(results.titles(results.failed))}." if results.failed else "")


def _table(results: StudyResults, table: str, rows: Sequence[Row]) -> list[str]:
    """Rows by figure, method and calibration set, columns by pattern."""
    quantities = list(dict.fromkeys(row.quantity for row in rows))
    patterns = [*([] if table == "cost" else [DENSE]), *results.record.grid["patterns"]]
    # Which of figure, method and calibration there are.
    columns = [len(quantities) > 1, True, len(results.record.grid["calibration"]) > 1]
    found = {(row.quantity, row.method, row.calibration, row.pattern): _figure(row) for row in rows}
    places = list(dict.fromkeys((row.method, row.calibration) for row in rows if row.method != DENSE))
    published = results.record.published
    whose = f", {published['method']}" if "method" in published else ""
    lines = [["figure", "method", "calibration", *patterns]]
    for quantity in quantities:
        label, digits = QUANTITIES[quantity].label, QUANTITIES[quantity].digits
        for method, calibration in places or [(DENSE, None)]:
            keys = [(DENSE, None, p) if p == DENSE else (method, calibration, p) for p in patterns]
            lines.append([label, method, calibration or "none", *(found.get((quantity, *key), "") for key in keys)])
        if values := published.get(quantity):
            figures = [f"{values[pattern]:,.{digits}f}" if pattern in values else "" for pattern in patterns]
            lines.append([label, f"*published{whose}*", "", *figures])
    chosen = [list(itertools.compress(line, [*columns, *(True for _ in patterns)])) for line in lines]
    source = published.get("source") if any(quantity in published for quantity in quantities) else None
    return [*markdown_table(chosen), *(["", f"Published: {source}"] if source else [])]


def markdown_table(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown; the first of `lines` is the head."""
    rows = ["| " + " | ".join(text.replace("|", r"\|") for text in line) + " |" for line in lines]
    return [rows[0], "|" + "---|" * len(lines[0]), *rows[1:]]


def _figure(row: Row) -> str:
    text = row.spread.text(QUANTITIES[row.quantity].digits)
    return text if row.spread.count == row.expected else f"{text} (n = {row.spread.count})"
