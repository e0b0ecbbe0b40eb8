"""The study's tables as Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from .grid import DENSE
from .method import how_it_was_measured
from .quantities import QUANTITIES, TABLES
from .results import Row, StudyResults


def markdown(results: StudyResults) -> str:
    """All tables that there are figures for, and how they were measured."""
    record = results.record
    lines = [f"# Pruning study of {record.job['model']}", "", *_state(results)]
    rows = results.rows()
    for table, title in TABLES.items():
        found = [row for row in rows if QUANTITIES[row.quantity].table == table]
        if found:
            lines += [f"## {title.format(text=_text(results))}", "", *_table(results, table, found), ""]
    lines += ["## How it was measured", "", *how_it_was_measured(results)]
    return "\n".join(lines).rstrip() + "\n"


def _text(results: StudyResults) -> str:
    """What perplexity is measured on."""
    texts = (results.record.job["evaluation"] or {}).get("texts") or {}
    return str(texts.get("name") or texts.get("file") or "texts")


def _state(results: StudyResults) -> list[str]:
    """What the tables hold, in sentences."""
    record = results.record
    seeds = record.grid["seeds"]
    lines = [f"{len(results.cells)} of {len(record.cells)} cells are done."]
    if len(seeds) > 1:
        names = ", ".join(map(str, seeds))
        lines.append(
            f"Figures are mean ± sample standard deviation over the calibration seeds {names} (n = {len(seeds)}); "
            "what has no ± is one run, or infinite."
        )
    if results.failed:
        lines.append("Failed: " + "; ".join(results.title(cell) for cell in results.failed) + ".")
    if results.left_out:
        lines.append(f"Not in the recipe any more, and not in the tables: {', '.join(results.left_out)}.")
    return [" ".join(lines), ""]


def _table(results: StudyResults, table: str, rows: Sequence[Row]) -> list[str]:
    """Rows by figure, method and calibration set, columns by pattern."""
    quantities = [name for name in QUANTITIES if any(row.quantity == name for row in rows)]
    patterns = [*([] if table == "cost" else [DENSE]), *results.record.grid["patterns"]]
    several = len(results.record.grid["calibration"]) > 1
    columns = [len(quantities) > 1, True, several]  # which of figure, method and calibration there are
    head = itertools.compress(["figure", "method", "calibration"], columns)
    lines = ["| " + " | ".join([*head, *patterns]) + " |", "|" + "---|" * (sum(columns) + len(patterns))]
    places = dict.fromkeys((row.method, row.calibration) for row in rows if row.method != DENSE)
    found = {(row.quantity, row.method, row.calibration, row.pattern): row for row in rows}
    published = results.record.published
    for quantity in quantities:
        label, digits = QUANTITIES[quantity].label, QUANTITIES[quantity].digits
        for method, calibration in places or {(DENSE, None): None}:
            start = itertools.compress([label, _escape(method), _escape(calibration or "none")], columns)
            where = [(DENSE, None) if pattern == DENSE else (method, calibration) for pattern in patterns]
            figures = [_figure(found.get((quantity, *w, p))) for w, p in zip(where, patterns, strict=True)]
            lines.append("| " + " | ".join([*start, *figures]) + " |")
        if values := published.get(quantity):
            start = itertools.compress([label, f"*published{_of(published)}*", ""], columns)
            figures = [f"{values[pattern]:,.{digits}f}" if pattern in values else "" for pattern in patterns]
            lines.append("| " + " | ".join([*start, *figures]) + " |")
    if "source" in published and any(quantity in published for quantity in quantities):
        lines += ["", f"Published: {published['source']}"]
    return lines


def _of(published: Mapping[str, Any]) -> str:
    return f", {_escape(published['method'])}" if "method" in published else ""


def _figure(row: Row | None) -> str:
    if row is None:
        return ""
    text = row.spread.text(QUANTITIES[row.quantity].digits)
    return text if row.spread.count == row.expected else f"{text} (n = {row.spread.count})"


def _escape(text: str) -> str:
    return text.replace("|", r"\|")
