"""The study's figures: perplexity by pattern, quality against the time of pruning, and against the number of
calibration tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .quantities import MEAN_F1
from .recipe import DENSE
from .results import Row, StudyResults

# Okabe and Ito (2008): told apart by colour-blind people. Markers tell them apart in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_QUALITIES = {"perplexity": "perplexity (lower is better)", MEAN_F1: "KoBEST mean F1 in % (higher is better)"}
_KOREAN_FONTS = ("Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo", "UnDotum")
_ERROR_BAR: dict[str, Any] = {"fmt": "none", "capsize": 3, "linewidth": 1.2}
_MARK: dict[str, Any] = {"markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.6, "linewidth": 1.3}


@dataclass
class _Point:
    """A figure: its row, where it stands on the axis (with a deviation, where it has one), and the names by which
    colour and marker are chosen."""

    row: Row
    x: float
    color: str
    marker: str
    x_deviation: float | None = None


def write_figures(results: StudyResults, output: Path) -> list[str]:
    """Draws the figures that there are data for, and gives their names; none without matplotlib."""
    for name in _FIGURES:
        (output / name).unlink(missing_ok=True)
    try:
        import matplotlib
        from matplotlib import font_manager
    except ImportError:
        return []
    present = font_manager.fontManager.get_font_names()
    fonts = ["DejaVu Sans", *(name for name in _KOREAN_FONTS if name in present)]
    rows = [row for row in results.rows() if math.isfinite(row.spread.mean)]
    with matplotlib.rc_context({"font.family": fonts, "text.parse_math": False}):
        return [name for name, draw in _FIGURES.items() if draw(results, rows, output / name)]


def _draw_patterns(results: StudyResults, rows: Sequence[Row], path: Path) -> bool:
    """Perplexity by pattern, a marker for each method and calibration set."""
    chosen = [row for row in rows if row.quantity == "perplexity" and row.method != DENSE]
    patterns = [name for name in results.record.grid["patterns"] if any(row.pattern == name for row in chosen)]
    names = list(dict.fromkeys(_name(results, row) for row in chosen))
    step = 0.8 / max(1, len(names))
    points = []
    for row in chosen:
        name = _name(results, row)
        place = patterns.index(row.pattern) + (names.index(name) - (len(names) - 1) / 2) * step
        points.append(_Point(row, place, name, name))

    def finish(axes: Any) -> None:
        for point in points:
            high = point.row.spread.mean + (point.row.spread.deviation or 0)
            how = {"textcoords": "offset points", "ha": "center", "fontsize": 7}
            axes.annotate(f"{point.row.spread.mean:.1f}", (point.x, high), (0, 5), **how)
        axes.set_xlim(-0.5, len(patterns) - 0.5)
        axes.set_xticks(range(len(patterns)), patterns)

    return _draw(rows, points, "pattern", path, finish)


def _draw_time(results: StudyResults, rows: Sequence[Row], path: Path) -> bool:
    """Quality against seconds of pruning: a marker for each method and calibration set, a colour for each pattern."""
    seconds = {_group(row): row.spread for row in rows if row.quantity == "pruning_seconds"}
    chosen = [row for row in rows if row.quantity == _quality(rows) and _group(row) in seconds]
    points = [
        _Point(row, seconds[_group(row)].mean, row.pattern, _name(results, row), seconds[_group(row)].deviation)
        for row in chosen
    ]
    return _draw(rows, points, "seconds of pruning", path, lambda axes: _make_logarithmic(axes, "x"))


def _draw_calibration(results: StudyResults, rows: Sequence[Row], path: Path) -> bool:
    """Quality against calibration tokens, a line for each method, pattern and text, where their number is varied."""
    identities = {
        (place.method, place.calibration, place.pattern): cell.identity
        for cell in results.record.cells.values()
        for place in cell.places
    }
    lines: dict[tuple[str, str, str], list[_Point]] = {}
    for row in rows:
        identity = identities.get(_group(row), {})
        if row.quantity == _quality(rows) and row.calibration is not None:
            # Of two files of one name each is its own.
            data = json.dumps([identity.get(name) for name in ("dataset", "tokenizer", "prepend_bos")])
            tokens = identity["num_samples"] * identity["seq_len"]
            point = _Point(row, tokens, row.pattern, row.method)
            lines.setdefault((row.method, row.pattern, data), []).append(point)
    lines = {key: line for key, line in lines.items() if len({point.x for point in line}) > 1}
    texts = list(dict.fromkeys(data for _, _, data in lines))
    if len(texts) > 1:
        for (method, _, data), line in lines.items():
            for point in line:
                point.marker = f"{method}, text {texts.index(data) + 1}"

    def finish(axes: Any) -> None:
        for line in lines.values():
            line.sort(key=lambda point: point.x)
            axes.plot([p.x for p in line], [p.row.spread.mean for p in line], color="#999999", linewidth=1, zorder=0)
        tokens = sorted({point.x for line in lines.values() for point in line})
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [f"{number:,.0f}" for number in tokens], fontsize=8, rotation=30, ha="right")
        axes.minorticks_off()

    points = [point for line in lines.values() for point in line]
    return _draw(rows, points, "calibration tokens", path, finish)


_FIGURES = {
    "perplexity_by_pattern.png": _draw_patterns,
    "quality_by_time.png": _draw_time,
    "quality_by_calibration.png": _draw_calibration,
}


def _draw(
    rows: Sequence[Row], points: Sequence[_Point], label: str, path: Path, finish: Callable[[Any], None]
) -> bool:
    """Markers with their deviations, the dense model as a line, a legend for colours and markers. False, and nothing
    written, without points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not points:
        return False
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = dict(zip(dict.fromkeys(point.color for point in points), COLORS * len(points), strict=False))
    markers = dict(zip(dict.fromkeys(point.marker for point in points), _MARKERS * len(points), strict=False))
    for point in points:
        spread, color = point.row.spread, colors[point.color]
        axes.errorbar(point.x, spread.mean, spread.deviation, point.x_deviation, color=color, **_ERROR_BAR)
        axes.plot(point.x, spread.mean, color=color, marker=markers[point.marker], **_MARK)
    for name in dict.fromkeys([*markers, *colors]):
        how = {"marker": markers.get(name), "linestyle": "" if name in markers else "-", **_MARK, "linewidth": 5}
        axes.plot([], [], color=colors.get(name, "#666666"), label=f"{name}{_seeds(points, name)}", **how)
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
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return True


def _seeds(points: Sequence[_Point], name: str) -> str:
    """How many runs there are, where it is not as many as the recipe asks for."""
    spreads = [(p.row.spread.count, p.row.expected) for p in points if name == p.marker]
    least, most = (f([count for count, _ in spreads], default=0) for f in (min, max))
    if all(count == expected for count, expected in spreads):
        return ""
    return f" (n = {least})" if least == most else f" (n = {least} to {most})"


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


def _group(row: Row) -> tuple[str, str | None, str]:
    return row.method, row.calibration, row.pattern


def _name(results: StudyResults, row: Row) -> str:
    """What a legend calls a method with its calibration set, which it names where there are several."""
    several = len(results.record.grid["calibration"]) > 1 and row.calibration is not None
    return f"{row.method}, {row.calibration}" if several else row.method
