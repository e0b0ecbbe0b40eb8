"""The study's figures: perplexity by pattern, and quality against the time of pruning, the number of calibration
tokens, and bits a weight."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..hub.figures import hangul_fonts, new_figure, save_figure
from .quantities import BITS, MEAN_F1
from .recipe import DENSE
from .results import Row, StudyResults

# Okabe and Ito (2008): told apart by colour-blind people. Markers tell them apart in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_QUALITIES = {"perplexity": "perplexity (lower is better)", MEAN_F1: "KoBEST mean F1 in % (higher is better)"}
_MARK: dict[str, Any] = {"markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.6, "linestyle": ""}


@dataclass
class _Point:
    """A figure: its row, where it stands on the axis (with a deviation, where it has one), and the names by which
    colour and marker are chosen."""

    row: Row
    x: float
    color: str
    marker: str
    x_deviation: float | None = None


# Points, and what is done to the axes when they are drawn.
_Drawing = tuple[list[_Point], Callable[[Any], None]]


def write_figures(results: StudyResults, output: Path) -> list[str]:
    """Draws the figures that there are data for, and gives their names; none without matplotlib."""
    for name in _FIGURES:
        (output / name).unlink(missing_ok=True)
    try:
        import matplotlib
    except ImportError:
        return []
    rows = [row for row in results.rows() if math.isfinite(row.spread.mean)]
    drawn = []
    with matplotlib.rc_context({"font.family": ["DejaVu Sans", *hangul_fonts()], "text.parse_math": False}):
        for name, (label, plan) in _FIGURES.items():
            points, finish = plan(results, rows)
            if points:
                save_figure(_draw(rows, points, label, finish), output / name)
                drawn.append(name)
    return drawn


def _by_pattern(results: StudyResults, rows: Sequence[Row]) -> _Drawing:
    """Perplexity by pattern, a marker for each method and calibration set."""
    chosen = [row for row in rows if row.quantity == "perplexity" and row.method != DENSE]
    patterns = [name for name in results.record.grid["patterns"] if any(row.pattern == name for row in chosen)]
    names = list(dict.fromkeys(_name(results, row) for row in chosen))
    points = []
    for row in chosen:
        name = _name(results, row)
        shift = (names.index(name) - (len(names) - 1) / 2) * 0.8 / len(names)
        points.append(_Point(row, patterns.index(row.pattern) + shift, name, name))

    def finish(axes: Any) -> None:
        for point in points:
            high = point.row.spread.mean + (point.row.spread.deviation or 0)
            how = {"textcoords": "offset points", "ha": "center", "fontsize": 7}
            axes.annotate(f"{point.row.spread.mean:.1f}", (point.x, high), (0, 5), **how)
        axes.set_xlim(-0.5, len(patterns) - 0.5)
        axes.set_xticks(range(len(patterns)), patterns)

    return points, finish


def _by_time(results: StudyResults, rows: Sequence[Row]) -> _Drawing:
    """Quality against seconds of pruning: a marker for each method and calibration set, a colour for each pattern."""
    seconds = {row.place: row.spread for row in rows if row.quantity == "pruning_seconds"}
    points = [
        _Point(row, seconds[row.place].mean, row.pattern, _name(results, row), seconds[row.place].deviation)
        for row in rows
        if row.quantity == _quality(rows) and row.place in seconds
    ]
    return points, lambda axes: _make_logarithmic(axes, "x")


def _by_tokens(results: StudyResults, rows: Sequence[Row]) -> _Drawing:
    """Quality against calibration tokens, a line for each method, pattern and text, where their number is varied."""
    cells = results.record.cells.values()
    identities = {(p.method, p.calibration, p.pattern): cell.identity for cell in cells for p in cell.places}
    lines: dict[tuple[str, str, str], list[_Point]] = {}
    for row in rows:
        if row.quantity == _quality(rows) and row.calibration is not None:
            identity = identities[row.place]
            # Of two files of one name each is its own.
            data = json.dumps([identity.get(name) for name in ("dataset", "tokenizer", "prepend_bos")])
            point = _Point(row, identity["num_samples"] * identity["seq_len"], row.pattern, row.method)
            lines.setdefault((row.method, row.pattern, data), []).append(point)
    lines = {key: line for key, line in lines.items() if len({point.x for point in line}) > 1}
    texts = list(dict.fromkeys(data for _, _, data in lines))
    points = [point for line in lines.values() for point in line]
    for (method, _, data), line in lines.items():
        for point in line:
            point.marker = f"{method}, text {texts.index(data) + 1}" if len(texts) > 1 else method

    def finish(axes: Any) -> None:
        for line in lines.values():
            line.sort(key=lambda point: point.x)
            axes.plot([p.x for p in line], [p.row.spread.mean for p in line], color="#999999", linewidth=1, zorder=0)
        tokens = sorted({point.x for point in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [f"{number:,.0f}" for number in tokens], fontsize=8, rotation=30, ha="right")
        axes.minorticks_off()

    return points, finish


def _by_bits(results: StudyResults, rows: Sequence[Row]) -> _Drawing:
    """Quality against bits a weight, where they differ for a pattern: a marker for each method and calibration set, a
    colour for each pattern."""
    bits = {row.place: row.spread.mean for row in rows if row.quantity == BITS}
    points = [
        _Point(row, bits[row.place], row.pattern, _name(results, row))
        for row in rows
        if row.quantity == _quality(rows) and row.place in bits
    ]
    varied = len({(point.row.pattern, point.x) for point in points}) > len({point.row.pattern for point in points})
    return points if varied else [], lambda axes: axes.set_xlim(left=0)


# File → label of its axis, and its points.
_FIGURES = {
    "perplexity_by_pattern.png": ("pattern", _by_pattern),
    "quality_by_time.png": ("seconds of pruning", _by_time),
    "quality_by_calibration.png": ("calibration tokens", _by_tokens),
    "quality_by_bits.png": ("bits for each weight of the pruned layers", _by_bits),
}


def _draw(rows: Sequence[Row], points: Sequence[_Point], label: str, finish: Callable[[Any], None]) -> Any:
    """Markers with their deviations, the dense model as a line, a legend for colours and markers."""
    figure = new_figure(8.4)
    axes = figure.add_subplot()
    colors = dict(zip(dict.fromkeys(point.color for point in points), COLORS * len(points), strict=False))
    markers = dict(zip(dict.fromkeys(point.marker for point in points), _MARKERS * len(points), strict=False))
    for point in points:
        spread, color, marker = point.row.spread, colors[point.color], markers[point.marker]
        how = {"color": color, "marker": marker, "capsize": 3, "elinewidth": 1.2, **_MARK}
        axes.errorbar(point.x, spread.mean, spread.deviation, point.x_deviation, **how)
    for name in dict.fromkeys([*markers, *colors]):
        axes.plot([], [], color=colors.get(name, "#666666"), label=name, **{**_MARK, "marker": markers.get(name, "_")})
    quality = points[0].row.quantity
    for row in rows:
        if row.method == DENSE and row.quantity == quality:
            text = f"dense {row.spread.mean:.2f}"
            axes.axhline(row.spread.mean, color="#444444", linestyle="--", linewidth=1, label=text, zorder=0)
    axes.set_xlabel(label)
    axes.set_ylabel(_QUALITIES[quality])
    if quality == "perplexity":
        _make_logarithmic(axes, "y")
    finish(axes)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _make_logarithmic(axes: Any, which: str) -> None:
    """A logarithmic axis with ticks that people read."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _quality(rows: Sequence[Row]) -> str:
    return next((name for name in _QUALITIES if any(row.quantity == name for row in rows)), "perplexity")


def _name(results: StudyResults, row: Row) -> str:
    """What a legend calls a method with its calibration set, which it names where there are several."""
    several = len(results.record.grid["calibration"]) > 1 and row.calibration is not None
    return f"{row.method}, {row.calibration}" if several else row.method
