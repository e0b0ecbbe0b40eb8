"""The study's figures: perplexity by pattern, quality against the time of pruning, and against the number of
calibration tokens. Each function returns False, and writes nothing, without matplotlib or figures to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .grid import DENSE
from .quantities import MEAN_F1
from .results import Row, StudyResults

# Okabe and Ito (2008): told apart by colour-blind people. Markers tell them apart in grey.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_QUALITIES = {"perplexity": "perplexity (lower is better)", MEAN_F1: "KoBEST mean F1 in % (higher is better)"}
Key = tuple[str, str | None]


def draw_patterns(results: StudyResults, path: Path) -> bool:
    """Perplexity by pattern, a marker with its deviation for each method and calibration set, the dense model a
    line."""
    rows = [row for row in _finite(results) if row.quantity == "perplexity" and row.method != DENSE]
    figure = _figure(results, rows, 2.6 + 0.36 * len(rows) + 0.3 * len(results.record.grid["patterns"]), 4.4)
    if figure is None:
        return False
    axes = figure.add_subplot()
    patterns, series = _patterns(results, rows), _series(rows)
    step = 0.8 / max(1, len(series))
    for number, key in enumerate(series):
        mine = [row for row in rows if _key(row) == key]
        places = [patterns.index(row.pattern) + (number - (len(series) - 1) / 2) * step for row in mine]
        _points(axes, places, mine, _COLORS[number % 7], _MARKERS[number % 9], _title(results, key))
        for place, row in zip(places, mine, strict=True):
            high = row.spread.mean + (row.spread.deviation or 0)
            text = f"{row.spread.mean:.1f}"
            axes.annotate(text, (place, high), (0, 5), textcoords="offset points", ha="center", fontsize=7)
    values = [row.spread.mean for row in rows] + _draw_published(results, axes, patterns)
    values += _draw_dense(results, axes, "perplexity")
    for border in range(1, len(patterns)):
        axes.axvline(border - 0.5, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.set_xlim(-0.5, len(patterns) - 0.5)
    axes.set_xticks(range(len(patterns)), [_plain(pattern) for pattern in patterns])
    axes.set_xlabel("pattern")
    axes.set_ylabel("perplexity (lower is better)")
    _logarithmic(axes, "y", values)
    return _save(results, figure, axes, path)


def draw_time(results: StudyResults, path: Path) -> bool:
    """Quality against seconds of pruning: a marker for each method and calibration set, a colour for each pattern."""
    finite = _finite(results)
    quality = _quality(finite)
    seconds = {(_key(row), row.pattern): row for row in finite if row.quantity == "pruning_seconds"}
    rows = [row for row in finite if row.quantity == quality and (_key(row), row.pattern) in seconds]
    figure = _figure(results, rows, 7.6, 4.6)
    if figure is None:
        return False
    axes = figure.add_subplot()
    patterns, series = _patterns(results, rows), _series(rows)
    for row in rows:
        time = seconds[_key(row), row.pattern].spread
        color, marker = _COLORS[patterns.index(row.pattern) % 7], _MARKERS[series.index(_key(row)) % 9]
        axes.errorbar(
            [time.mean],
            [row.spread.mean],
            xerr=time.deviation,
            yerr=row.spread.deviation,
            **_style(color, marker),
        )
    empty: tuple[list[float], list[float]] = ([], [])
    for number, key in enumerate(series):
        axes.plot(*empty, linestyle="", marker=_MARKERS[number % 9], color="#666666", label=_title(results, key))
    for number, pattern in enumerate(patterns):
        axes.plot(*empty, linewidth=5, color=_COLORS[number % 7], label=_plain(pattern))
    values = [row.spread.mean for row in rows] + _draw_dense(results, axes, quality)
    axes.set_xlabel("seconds of pruning")
    axes.set_ylabel(_QUALITIES[quality])
    _logarithmic(axes, "x", [seconds[_key(row), row.pattern].spread.mean for row in rows])
    if quality == "perplexity":
        _logarithmic(axes, "y", values)
    return _save(results, figure, axes, path)


def draw_calibration(results: StudyResults, path: Path) -> bool:
    """Quality against calibration tokens, a line for each method, pattern and text, where the recipe varies their
    number."""
    finite = _finite(results)
    quality = _quality(finite)
    points: dict[tuple[str, str, str], list[tuple[int, Row]]] = {}
    for row in finite:
        identity = _identity(results, row)
        if row.quantity == quality and identity is not None:
            key = (row.method, row.pattern, _text_of(identity["dataset"]))
            points.setdefault(key, []).append((identity["num_samples"] * identity["seq_len"], row))
    lines = {key: sorted(line, key=lambda point: point[0]) for key, line in points.items()}
    lines = {key: line for key, line in lines.items() if len({tokens for tokens, _ in line}) > 1}
    figure = _figure(results, [row for line in lines.values() for _, row in line], 7.6, 4.6)
    if figure is None:
        return False
    axes = figure.add_subplot()
    names = list(dict.fromkeys((method, text) for method, _, text in lines))
    patterns = _patterns(results, [row for line in lines.values() for _, row in line])
    texts = {text for _, _, text in lines}
    for (method, pattern, text), line in lines.items():
        label = ", ".join([method, pattern, *([text] if len(texts) > 1 else [])])
        color, marker = _COLORS[patterns.index(pattern) % 7], _MARKERS[names.index((method, text)) % 9]
        dashes = ("-", "--", ":", "-.")[names.index((method, text)) % 4]
        rows = [row for _, row in line]
        _points(axes, [tokens for tokens, _ in line], rows, color, marker, _plain(label), linestyle=dashes)
    values = [row.spread.mean for line in lines.values() for _, row in line] + _draw_dense(results, axes, quality)
    tokens = sorted({tokens for line in lines.values() for tokens, _ in line})
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{number:,}" for number in tokens], fontsize=8, rotation=30, ha="right")
    axes.minorticks_off()
    axes.set_xlabel("calibration tokens")
    axes.set_ylabel(_QUALITIES[quality])
    if quality == "perplexity":
        _logarithmic(axes, "y", values)
    return _save(results, figure, axes, path)


def _finite(results: StudyResults) -> list[Row]:
    return [row for row in results.rows() if math.isfinite(row.spread.mean)]


def _quality(rows: Sequence[Row]) -> str:
    return next((name for name in _QUALITIES if any(row.quantity == name for row in rows)), "perplexity")


def _key(row: Row) -> Key:
    return row.method, row.calibration


def _series(rows: Sequence[Row]) -> list[Key]:
    return list(dict.fromkeys(map(_key, rows)))


def _patterns(results: StudyResults, rows: Sequence[Row]) -> list[str]:
    return [p for p in results.record.grid["patterns"] if any(row.pattern == p for row in rows)]


def _title(results: StudyResults, key: Key) -> str:
    several = len(results.record.grid["calibration"]) > 1
    return _plain(f"{key[0]}, {key[1]}" if several and key[1] is not None else key[0])


def _identity(results: StudyResults, row: Row) -> dict[str, Any] | None:
    """Settings of a cell of a row that reads data."""
    for cell, content in results.record.cells.items():
        for place in results.record.places(cell):
            where = (place.method, place.calibration, place.pattern)
            if where == (row.method, row.calibration, row.pattern) and place.calibration is not None:
                return dict(content["identity"])
    return None


def _text_of(dataset: Any) -> str:
    return str(dataset.get("file", dataset)) if isinstance(dataset, dict) else str(dataset)


def _figure(results: StudyResults, rows: Sequence[Row], width: float, height: float) -> Any:
    """An empty figure; None without matplotlib or rows."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not rows:
        return None
    figure = Figure(figsize=(max(6.4, min(width, 16)), height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style(color: str, marker: str) -> dict[str, Any]:
    return {
        "color": color,
        "marker": marker,
        "markersize": 6,
        "capsize": 3,
        "linewidth": 1.3,
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
    }


def _points(
    axes: Any, places: Sequence[float], rows: Sequence[Row], color: str, marker: str, label: str, linestyle: str = ""
) -> None:
    means = [row.spread.mean for row in rows]
    errors = [row.spread.deviation or 0 for row in rows]
    axes.errorbar(places, means, yerr=errors, label=label, linestyle=linestyle, **_style(color, marker))


def _draw_dense(results: StudyResults, axes: Any, quality: str) -> list[float]:
    rows = [row for row in _finite(results) if row.method == DENSE and row.quantity == quality]
    for row in rows:
        label = f"dense {row.spread.mean:.2f}"
        axes.axhline(row.spread.mean, color="#444444", linestyle="--", linewidth=1, label=label, zorder=0)
    return [row.spread.mean for row in rows]


def _draw_published(results: StudyResults, axes: Any, patterns: Sequence[str]) -> list[float]:
    published = results.record.published
    found = {p: value for p, value in published.get("perplexity", {}).items() if p in patterns}
    for number, (pattern, value) in enumerate(found.items()):
        place, label = patterns.index(pattern), f"published, {published['method']}" if "method" in published else None
        line = [place - 0.42, place + 0.42]
        axes.plot(line, [value, value], color="#888888", linewidth=1, linestyle=":", label=None if number else label)
    return list(found.values())


def _logarithmic(axes: Any, which: str, values: Sequence[float]) -> None:
    """A logarithmic axis with ticks that people read, where the values spread far enough for one."""
    low, high = min(values) / 1.12, max(values) * 1.18
    if low <= 0:
        return
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) >= 4:
            break
    if len(ticks) < 2:
        return
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    getattr(axes, f"set_{which}ticks")(ticks, [f"{tick:,g}" if tick < 1e6 else f"{tick:.0e}" for tick in ticks])
    getattr(axes, f"{which}axis").minorticks_off()


def _save(results: StudyResults, figure: Any, axes: Any, path: Path) -> bool:
    seeds = len(results.record.grid["seeds"])
    note = f", mean ± deviation over {seeds} seeds" if seeds > 1 else ""
    axes.set_title(_plain(f"{results.record.job['model']}{note}"), fontsize=10)
    axes.grid(alpha=0.3, axis="y" if axes.get_xlabel() == "pattern" else "both")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return True


def _plain(text: str) -> str:
    """Without the signs that matplotlib reads as mathematics, or hides."""
    return text.replace("$", r"\$").lstrip("_")
