"""The study's tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

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
            lines += [f"## {title}", "", *_table(results, table, found), ""]
    lines += ["## How it was measured", "", *how_it_was_measured(results)]
    return "\n".join(lines).rstrip() + "\n"


def _state(results: StudyResults) -> list[str]:
    """What the tables hold, in sentences."""
    record = results.record
    seeds = record.grid["seeds"]
    lines = [f"{len(results.cells)} of {len(record.cells)} cells are done."]
    if len(seeds) > 1:
        names = ", ".join(map(str, seeds))
        lines.append(
            f"Figures are mean ± sample standard deviation over the calibration seeds {names} (n = {len(seeds)}); "
            "what has no ± is one run."
        )
    if results.failed:
        lines.append("Failed: " + "; ".join(results.title(cell) for cell in results.failed) + ".")
    if results.left_out:
        lines.append(f"Not in the recipe any more, and not in the tables: {', '.join(results.left_out)}.")
    return [" ".join(lines), ""]


def _table(results: StudyResults, table: str, rows: Sequence[Row]) -> list[str]:
    quantities = [name for name in QUANTITIES if any(row.quantity == name for row in rows)]
    patterns = [*([] if table == "cost" else [DENSE]), *results.record.grid["patterns"]]
    several = len(results.record.grid["calibration"]) > 1
    head = ["method", *(["calibration"] if several else []), *([""] if len(quantities) > 1 else [])]
    lines = ["| " + " | ".join([*head, *patterns]) + " |", "|" + "---|" * (len(head) + len(patterns))]
    places = dict.fromkeys((row.method, row.calibration) for row in rows if row.method != DENSE)
    found = {(row.quantity, row.method, row.calibration, row.pattern): row for row in rows}
    for method, calibration in places or {(DENSE, None): None}:
        for quantity in quantities:
            cells = [_escape(method), *([_escape(calibration or "none")] if several else [])]
            cells += [QUANTITIES[quantity].label] if len(quantities) > 1 else []
            for pattern in patterns:
                place = (DENSE, None) if pattern == DENSE else (method, calibration)
                cells.append(_figure(found.get((quantity, *place, pattern))))
            lines.append("| " + " | ".join(cells) + " |")
    return lines + _published(results, quantities, patterns, len(head), several)


def _figure(row: Row | None) -> str:
    if row is None:
        return ""
    text = row.spread.text(QUANTITIES[row.quantity].digits)
    return text if row.spread.count == row.expected else f"{text} (n = {row.spread.count})"


def _published(
    results: StudyResults, quantities: Sequence[str], patterns: Sequence[str], num_head: int, several: bool
) -> list[str]:
    """Rows of the published values, and whose they are."""
    published = results.record.published
    name = f"*published{', ' + published['method'] if 'method' in published else ''}*"
    lines = []
    for quantity in quantities:
        values = published.get(quantity)
        if values:
            digits = QUANTITIES[quantity].digits
            head = [name, *([""] if several else []), *([QUANTITIES[quantity].label] if len(quantities) > 1 else [])]
            figures = [f"{values[pattern]:,.{digits}f}" if pattern in values else "" for pattern in patterns]
            lines.append("| " + " | ".join([*head[:num_head], *figures]) + " |")
    return [*lines, "", f"Published: {published['source']}"] if lines and "source" in published else lines


def _escape(text: str) -> str:
    return text.replace("|", r"\|")
