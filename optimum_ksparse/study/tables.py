"""The study's tables: Markdown, JSON, and HTML for notebooks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..checkpoint.staging import write_text
from ..records import as_html, to_json
from .quantities import QUANTITIES, TABLES
from .recipe import CALIBRATION, DENSE

if TYPE_CHECKING:
    from .results import Row, StudyResults


def write_tables(results: StudyResults, output: Path) -> None:
    """Writes `tables.md`, and `results.json`, in which an infinite figure is null, and a row has what was published of
    it: of the published method, or of the dense model."""
    published, rows = results.record.published, []
    for row in results.rows():
        is_theirs = row.pattern == DENSE or published.get("method") in (None, row.method)
        figure = published.get(row.quantity, {}).get(row.pattern) if is_theirs else None
        place = {"figure": row.quantity, "method": row.method, "calibration": row.calibration, "pattern": row.pattern}
        spread = {"mean": row.spread.mean, "deviation": row.spread.deviation, "seeds": row.spread.count}
        rows.append({**place, **spread, "published": figure})
    write_text(output / "tables.md", markdown(results))
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


def markdown(results: StudyResults) -> str:
    """All tables that there are figures for, and how they were measured."""
    lines = [f"# Pruning study of {results.record.job['model']}", "", _state(results), ""]
    for title, texts, note in _tables(results):
        cells = [[text.replace("|", r"\|") for text in line] for line in texts]
        head, *body = [f"| {' | '.join(line)} |" for line in cells]
        lines += [f"## {title}", "", head, "|" + "---|" * len(cells[0]), *body, *(["", note] if note else []), ""]
    lines += ["## How it was measured", "", "```yaml", _how(results), "```"]
    return "\n".join(lines).rstrip() + "\n"


def html(results: StudyResults) -> str:
    """All tables that there are figures for."""
    head = f"Pruning study of {results.record.job['model']}: {_state(results)}"
    tables = [
        as_html(
            [[text.replace("**", "").strip("*") for text in line] for line in texts], title, [note] if note else []
        )
        for title, texts, note in _tables(results)
    ]
    return f"<div><p>{escape(head)}</p>{''.join(tables)}</div>"


def _state(results: StudyResults) -> str:
    """How far it is, and what its figures are."""
    seeds = results.record.grid["seeds"]
    state = f"{len(results.cells)} of {len(results.record.cells)} cells are done."
    if len(seeds) > 1:
        state += (
            f" Figures are mean ± sample standard deviation over the calibration seeds {', '.join(map(str, seeds))} "
            f"(n = {len(seeds)}); what has no ± is one run, or infinite."
        )
    return state + (f" Failed: {'; '.join(results.titles(results.failed))}." if results.failed else "")


def _tables(results: StudyResults) -> Iterator[tuple[str, list[list[str]], str]]:
    """For each table its title, its rows, the head first, and where published figures are from."""
    texts = (results.record.job.get("evaluation") or {}).get("texts") or {}
    for table, title in TABLES.items():
        rows = [row for row in results.rows() if QUANTITIES[row.quantity].table == table]
        if rows:
            title = title.format(text=texts.get("name") or texts.get("file") or "texts")
            yield title, *_table(results, table, rows)


def _how(results: StudyResults) -> str:
    """Model, data, settings of the methods, protocols, hardware and versions as YAML, without paths and names of
    machines. Of what differs between cells there is an entry each."""
    record, cells = results.record, list(results.cells.values())
    data = {p.calibration: cell.identity for cell in record.cells.values() for p in cell.places if p.calibration}
    grid = ("pattern", "seed", *CALIBRATION)
    told = {
        "model": record.job["model"],
        "weight files": record.job["weights"],
        "calibration": {n: {key: made[key] for key in CALIBRATION if key in made} for n, made in data.items()},
        "methods": {
            name: {key: value for key, value in results.identity_of(name).items() if key not in grid}
            for name in record.grid["methods"]
        },
        "measurements": _distinct([{row.name: row.protocol} for cell in cells for row in cell.measurements]),
        "seconds of pruning": "from the loaded to the pruned model; peak memory is that of the process until then",
        "hardware": _distinct([cell.hardware for cell in cells]),
        "versions": _distinct([cell.versions for cell in cells]),
    }
    text: str = yaml.safe_dump(json.loads(to_json(told)), sort_keys=False, allow_unicode=True, width=110)
    return text.rstrip()


def _distinct(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for number, entry in enumerate(entries) if entry not in entries[:number]]


def _table(results: StudyResults, table: str, rows: Sequence[Row]) -> tuple[list[list[str]], str]:
    """Lines by figure, method and calibration set, columns by pattern; and where published figures are from."""
    record, published = results.record, results.record.published
    quantities = list(dict.fromkeys(row.quantity for row in rows))
    patterns = [*([] if table == "cost" else [DENSE]), *record.grid["patterns"]]
    # Which of figure, method and calibration there are.
    columns = [len(quantities) > 1, True, len(record.grid["calibration"]) > 1, *(True for _ in patterns)]
    figures = {}
    for row in rows:
        runs = "" if row.spread.count == row.expected else f" (n = {row.spread.count})"
        figures[row.quantity, *row.place] = row.spread.text(QUANTITIES[row.quantity].digits) + runs
    places = list(dict.fromkeys((row.method, row.calibration) for row in rows if row.method != DENSE))
    whose = f"*published, {published['method']}*" if "method" in published else "*published*"
    lines = [["figure", "method", "calibration", *patterns]]
    for name in quantities:
        quantity = QUANTITIES[name]
        for method, calibration in places or [(DENSE, None)]:
            keys = [(DENSE, None, p) if p == DENSE else (method, calibration, p) for p in patterns]
            cells = [figures.get((name, *key), "") for key in keys]
            lines.append([quantity.label, method, calibration or "none", *cells])
        if values := published.get(name):
            cells = [f"{values[pattern]:,.{quantity.digits}f}" if pattern in values else "" for pattern in patterns]
            lines.append([quantity.label, whose, "", *cells])
    is_published = "source" in published and any(name in published for name in quantities)
    source = f"Published: {published['source']}" if is_published else ""
    return [list(itertools.compress(line, columns)) for line in lines], source
