"""What the figures of a study share: colours, fonts, axes, titles."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .grid import DENSE, settings_in_words
from .results import Row, StudyResults

# Okabe and Ito (2008): told apart by colour-blind people. Markers tell them apart in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
ERROR_BAR: dict[str, Any] = {"fmt": "none", "capsize": 3, "linewidth": 1.2}
MARKER: dict[str, Any] = {"markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.6, "linewidth": 1.3}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_KOREAN_FONTS = ("Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo", "UnDotum")
_FIRST_ASIAN = "\u1100"
Key = tuple[str, str | None]
Draw = Callable[[StudyResults, Path], bool]


def with_fonts(draw: Draw) -> Draw:
    """Draws with a font that has Korean letters, where there is one; not without matplotlib."""

    @functools.wraps(draw)
    def drawn(results: StudyResults, path: Path) -> bool:
        try:
            import matplotlib
        except ImportError:
            return False
        with matplotlib.rc_context({"font.family": ["DejaVu Sans", *_korean_fonts()]}):
            return draw(results, path)

    return drawn


def _korean_fonts() -> list[str]:
    from matplotlib import font_manager

    there = set(font_manager.fontManager.get_font_names())
    return [name for name in _KOREAN_FONTS if name in there]


def new_figure(rows: Sequence[Row], width: float, height: float) -> Any:
    """An empty figure; None without rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not rows:
        return None
    figure = Figure(figsize=(max(6.4, min(width, 16)), height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_points(
    axes: Any, places: Sequence[float], rows: Sequence[Row], color: str, marker: str, label: str, linestyle: str = ""
) -> None:
    """Markers with their deviations, and the line between them where `linestyle` names one."""
    means = [row.spread.mean for row in rows]
    known = [(x, row.spread) for x, row in zip(places, rows, strict=True) if row.spread.deviation is not None]
    if known:
        errors = [spread.deviation for _, spread in known]
        axes.errorbar([x for x, _ in known], [spread.mean for _, spread in known], errors, color=color, **ERROR_BAR)
    if any(row.spread.count < row.expected for row in rows):
        counts = sorted({row.spread.count for row in rows})
        label += f" (n = {counts[0]})" if len(counts) == 1 else f" (n = {counts[0]} to {counts[-1]})"
    axes.plot(places, means, label=label, linestyle=linestyle, color=color, marker=marker, **MARKER)


def draw_dense(results: StudyResults, axes: Any, quality: str) -> list[float]:
    """The dense model as a line. Gives the value, for the limits of the axis."""
    rows = [row for row in finite_rows(results) if row.method == DENSE and row.quantity == quality]
    for row in rows:
        label = f"dense {row.spread.mean:.2f}"
        axes.axhline(row.spread.mean, color="#444444", linestyle="--", linewidth=1, label=label, zorder=0)
    return [row.spread.mean for row in rows]


def draw_published(results: StudyResults, axes: Any, patterns: Sequence[str]) -> list[float]:
    """What was published of perplexity, a line for each pattern. Gives the values."""
    published = results.record.published
    found = {p: value for p, value in published.get("perplexity", {}).items() if p in patterns}
    for number, (pattern, value) in enumerate(found.items()):
        place, label = patterns.index(pattern), f"published, {published['method']}" if "method" in published else None
        line = [place - 0.42, place + 0.42]
        axes.plot(line, [value, value], color="#888888", linewidth=1, linestyle=":", label=None if number else label)
    return list(found.values())


def ends(rows: Iterable[Row]) -> list[float]:
    """Where the error bars of rows end, for the limits of a logarithmic axis."""
    spreads = [(row.spread.mean, row.spread.deviation or 0) for row in rows]
    return [end for mean, deviation in spreads for end in (mean - deviation, mean + deviation) if end > 0]


def make_logarithmic(axes: Any, which: str, values: Sequence[float]) -> None:
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


def save_figure(results: StudyResults, figure: Any, axes: Any, path: Path) -> bool:
    """Title, grid and legend; the same results give the same bytes."""
    seeds = len(results.record.grid["seeds"])
    whole = all(row.spread.count == row.expected for row in results.rows())
    note = f", mean ± deviation over {'' if whole else 'up to '}{seeds} seeds" if seeds > 1 else ""
    axes.set_title(plain(f"{results.record.job['model']}{note}"), fontsize=10)
    axes.grid(alpha=0.3, axis="y" if axes.get_xlabel() == "pattern" else "both")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return True


def plain(text: str) -> str:
    """Without the signs that matplotlib reads as mathematics, or hides."""
    return text.replace("$", r"\$").lstrip("_")


def title_of(results: StudyResults, key: Key) -> str:
    """What the legend calls a method with its calibration set, which it names where there are several."""
    several = len(results.record.grid["calibration"]) > 1
    method = shown(key[0], settings_of(results, key[0]))
    if not several or key[1] is None:
        return plain(method)
    number = f"data {results.record.grid['calibration'].index(key[1]) + 1}"
    return plain(f"{method}, {shown(key[1], number)}")


def settings_of(results: StudyResults, method: str) -> str:
    """What a method is, without the name that the recipe gave it."""
    identity = results.identity_of(method)
    return settings_in_words(identity) if identity else method


def shown(text: str, instead: str) -> str:
    """`text`, or another one where no font here has its letters."""
    return instead if any(letter >= _FIRST_ASIAN for letter in text) and not _korean_fonts() else text


def finite_rows(results: StudyResults) -> list[Row]:
    """The rows that can be drawn."""
    return [row for row in results.rows() if math.isfinite(row.spread.mean)]
