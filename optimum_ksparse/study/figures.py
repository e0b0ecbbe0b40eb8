"""The study's figures: perplexity by pattern, quality against the time of pruning, and against the number of
calibration tokens. Each function returns False, and writes nothing, without matplotlib or figures to draw."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..dataset import is_mix, mix_parts
from .drawing import (
    COLORS,
    ERROR_BAR,
    MARKER,
    MARKERS,
    Key,
    draw_dense,
    draw_points,
    draw_published,
    ends,
    finite_rows,
    make_logarithmic,
    new_figure,
    plain,
    save_figure,
    settings_of,
    shown,
    title_of,
    with_fonts,
)
from .grid import DENSE
from .quantities import MEAN_F1
from .results import Row, StudyResults

# What makes calibration data what they are, but for their amount.
_DATA = ("dataset", "tokenizer", "prepend_bos")
_QUALITIES = {"perplexity": "perplexity (lower is better)", MEAN_F1: "KoBEST mean F1 in % (higher is better)"}


@with_fonts
def draw_patterns(results: StudyResults, path: Path) -> bool:
    """Perplexity by pattern, a marker with its deviation for each method and calibration set, the dense model a
    line."""
    rows = [row for row in finite_rows(results) if row.quantity == "perplexity" and row.method != DENSE]
    figure = new_figure(rows, 2.6 + 0.36 * len(rows) + 0.3 * len(results.record.grid["patterns"]), 4.4)
    if figure is None:
        return False
    axes = figure.add_subplot()
    patterns, series = _patterns(results, rows), _series(rows)
    step = 0.8 / max(1, len(series))
    for number, key in enumerate(series):
        mine = [row for row in rows if _key(row) == key]
        places = [patterns.index(row.pattern) + (number - (len(series) - 1) / 2) * step for row in mine]
        draw_points(axes, places, mine, COLORS[number % 7], MARKERS[number % 9], title_of(results, key))
        for place, row in zip(places, mine, strict=True):
            high = row.spread.mean + (row.spread.deviation or 0)
            text = f"{row.spread.mean:.1f}"
            axes.annotate(text, (place, high), (0, 5), textcoords="offset points", ha="center", fontsize=7)
    values = ends(rows) + draw_published(results, axes, patterns)
    values += draw_dense(results, axes, "perplexity")
    for border in range(1, len(patterns)):
        axes.axvline(border - 0.5, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.set_xlim(-0.5, len(patterns) - 0.5)
    axes.set_xticks(range(len(patterns)), [plain(pattern) for pattern in patterns])
    axes.set_xlabel("pattern")
    axes.set_ylabel("perplexity (lower is better)")
    make_logarithmic(axes, "y", values)
    return save_figure(results, figure, axes, path)


@with_fonts
def draw_time(results: StudyResults, path: Path) -> bool:
    """Quality against seconds of pruning: a marker for each method and calibration set, a colour for each pattern."""
    finite = finite_rows(results)
    quality = _quality(finite)
    seconds = {(_key(row), row.pattern): row for row in finite if row.quantity == "pruning_seconds"}
    rows = [row for row in finite if row.quantity == quality and (_key(row), row.pattern) in seconds]
    figure = new_figure(rows, 7.6, 4.6)
    if figure is None:
        return False
    axes = figure.add_subplot()
    patterns, series = _patterns(results, rows), _series(rows)
    for row in rows:
        time = seconds[_key(row), row.pattern].spread
        color, marker = COLORS[patterns.index(row.pattern) % 7], MARKERS[series.index(_key(row)) % 9]
        errors = {"xerr": time.deviation, "yerr": row.spread.deviation}
        axes.errorbar([time.mean], [row.spread.mean], **errors, **ERROR_BAR, color=color)
        axes.plot([time.mean], [row.spread.mean], color=color, marker=marker, **MARKER)
    empty: tuple[list[float], list[float]] = ([], [])
    for number, key in enumerate(series):
        axes.plot(*empty, linestyle="", marker=MARKERS[number % 9], color="#666666", label=title_of(results, key))
    for number, pattern in enumerate(patterns):
        axes.plot(*empty, linewidth=5, color=COLORS[number % 7], label=plain(pattern))
    values = ends(rows) + draw_dense(results, axes, quality)
    axes.set_xlabel("seconds of pruning")
    axes.set_ylabel(_QUALITIES[quality])
    make_logarithmic(axes, "x", ends(seconds[_key(row), row.pattern] for row in rows))
    if quality == "perplexity":
        make_logarithmic(axes, "y", values)
    return save_figure(results, figure, axes, path)


@with_fonts
def draw_calibration(results: StudyResults, path: Path) -> bool:
    """Quality against calibration tokens, a line for each method, pattern and text, where the recipe varies their
    number."""
    finite = finite_rows(results)
    quality = _quality(finite)
    points: dict[tuple[str, str, str], list[tuple[int, Row]]] = {}
    for row in finite:
        identity = _identity(results, row)
        if row.quantity == quality and identity is not None:
            key = (row.method, row.pattern, _data_of(identity))
            points.setdefault(key, []).append((identity["num_samples"] * identity["seq_len"], row))
    lines = {key: sorted(line, key=lambda point: point[0]) for key, line in points.items()}
    lines = {key: line for key, line in lines.items() if len({tokens for tokens, _ in line}) > 1}
    figure = new_figure([row for line in lines.values() for _, row in line], 7.6, 4.6)
    if figure is None:
        return False
    axes = figure.add_subplot()
    names = list(dict.fromkeys((method, text) for method, _, text in lines))
    patterns = _patterns(results, [row for line in lines.values() for _, row in line])
    texts = list(dict.fromkeys(text for _, text in names))
    called = _labels(texts)
    for (method, pattern, text), line in lines.items():
        name = shown(called[text], f"text {texts.index(text) + 1}")
        label = ", ".join([shown(method, settings_of(results, method)), pattern, *([name] if texts[1:] else [])])
        color, marker = COLORS[patterns.index(pattern) % 7], MARKERS[names.index((method, text)) % 9]
        dashes = ("-", "--", ":", "-.")[names.index((method, text)) % 4]
        rows = [row for _, row in line]
        draw_points(axes, [tokens for tokens, _ in line], rows, color, marker, plain(label), linestyle=dashes)
    values = ends(row for line in lines.values() for _, row in line) + draw_dense(results, axes, quality)
    tokens = sorted({tokens for line in lines.values() for tokens, _ in line})
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{number:,}" for number in tokens], fontsize=8, rotation=30, ha="right")
    axes.minorticks_off()
    axes.set_xlabel("calibration tokens")
    axes.set_ylabel(_QUALITIES[quality])
    if quality == "perplexity":
        make_logarithmic(axes, "y", values)
    return save_figure(results, figure, axes, path)


def _quality(rows: Sequence[Row]) -> str:
    return next((name for name in _QUALITIES if any(row.quantity == name for row in rows)), "perplexity")


def _key(row: Row) -> Key:
    return row.method, row.calibration


def _series(rows: Sequence[Row]) -> list[Key]:
    return list(dict.fromkeys(map(_key, rows)))


def _patterns(results: StudyResults, rows: Sequence[Row]) -> list[str]:
    return [p for p in results.record.grid["patterns"] if any(row.pattern == p for row in rows)]


def _identity(results: StudyResults, row: Row) -> dict[str, Any] | None:
    """Settings of a cell of a row that reads data."""
    for cell, content in results.record.cells.items():
        for place in results.record.places(cell):
            where = (place.method, place.calibration, place.pattern)
            if where == (row.method, row.calibration, row.pattern) and place.calibration is not None:
                return dict(content["identity"])
    return None


def _data_of(identity: Mapping[str, Any]) -> str:
    """What calibration data are but for their amount: of two files of one name each is its own."""
    return json.dumps({name: identity[name] for name in _DATA if name in identity}, sort_keys=True)


def _labels(texts: Sequence[str]) -> dict[str, str]:
    """What to call each of the data that `_data_of` gives: numbered where others are called the same."""
    labels = []
    for text in texts:
        found = json.loads(text)
        name = _text_of(found.pop("dataset"))
        labels.append(", ".join([name, *(f"{key}={value}" for key, value in found.items())]))
    numbered = [f"{label} no. {number}" for number, label in enumerate(labels, start=1)]
    pairs = zip(labels, numbered, strict=True)
    return dict(zip(texts, (new if labels.count(old) > 1 else old for old, new in pairs), strict=True))


def _text_of(dataset: Any) -> str:
    if is_mix(dataset):
        return " + ".join(f"{weight:g} {_text_of(part)}" for part, weight in mix_parts(dataset))
    return str(dataset.get("file", dataset)) if isinstance(dataset, dict) else str(dataset)
