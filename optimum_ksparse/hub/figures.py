"""The card's figures, as PNG beside it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..evaluation import TASKS, EvaluationResults, Measurement, task_of
from ..report import SparsityReport
from ..version import install_hint

ERROR_FIGURE = "relative_output_error.png"
RESULTS_FIGURE = "dense_and_sparse.png"
FIGURES = (ERROR_FIGURE, RESULTS_FIGURE)
_KOREAN = {
    "perplexity (lower is better)": "퍼플렉시티 (낮을수록 좋음)",
    "{} macro F1 (higher is better)": "{} 매크로 F1 (높을수록 좋음)",
    "{} F1 in % (higher is better)": "{} F1, % (높을수록 좋음)",
    "block": "블록",
    "relative output error": "상대 출력 오차",
    "dense": "원본",
    "sparse": "희소",
    "tuned": "튜닝 후",
}
# Fonts with Hangul, as Linux, macOS and Windows have them; the first that is installed is taken.
_HANGUL_FONTS = (
    *("Pretendard", "Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "NanumBarunGothic"),
    *("Apple SD Gothic Neo", "AppleGothic", "Malgun Gothic", "Baekmuk Gulim", "UnDotum"),
)
_DENSE, _SPARSE = "#9aa5b1", "#1f6feb"
Say = Callable[[str], str]
Pair = tuple[Measurement, Measurement]

logger = logging.get_logger(__name__)


def draw_figures(
    directory: Path, report: SparsityReport | None, results: EvaluationResults | None, language: str = "en"
) -> dict[str, bool]:
    """Draws what there are data for; which figures were drawn. None without matplotlib, which is said once. The same
    data give the same bytes. Korean labels need a font that has Hangul; without one they are English."""
    drawn = dict.fromkeys(FIGURES, False)
    for name in drawn:
        (directory / name).unlink(missing_ok=True)
    try:
        import matplotlib
    except ImportError:
        logger.warning_once(f"The card gets no figures: they need matplotlib: {install_hint('plot')}")
        return drawn
    fonts = hangul_fonts() if language == "ko" else []
    say = (lambda text: _KOREAN.get(text, text)) if fonts else str
    figures: dict[str, Any] = {}
    with matplotlib.rc_context({"font.family": [*fonts[:1], "sans-serif"], "text.parse_math": False}):
        measured = report is not None and any(layer.relative_output_error is not None for layer in report.layers)
        if report is not None and measured and not report.changes:
            figures[ERROR_FIGURE] = _output_errors(report, say)
        if results is not None and (pairs := _drawable(results)):
            figures[RESULTS_FIGURE] = _dense_and_sparse(pairs, say)
        for name, figure in figures.items():
            save_figure(figure, directory / name)
    return drawn | dict.fromkeys(figures, True)


def new_figure(width: float, height: float = 4.6) -> Any:
    """An empty figure of so many inches, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure without frames above and to the right; no version in it: the same data, the same bytes."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, metadata={"Software": None})


@functools.cache
def hangul_fonts() -> list[str]:
    """Fonts with Hangul that are installed."""
    from matplotlib.font_manager import fontManager

    return [name for name in _HANGUL_FONTS if name in fontManager.get_font_names()]


def _drawable(results: EvaluationResults) -> list[Pair]:
    """Comparable pairs of perplexity and F1 with finite figures, before tuning first."""
    pairs = [pair for pair in results.comparable() if pair[0].name in TASKS]
    pairs = [pair for pair in pairs if {"perplexity", "f1"} & pair[0].metrics.keys()]
    pairs = [pair for pair in pairs if all(row.metrics.get("perplexity", 0) is not None for row in pair)]
    order = ["perplexity", *TASKS]
    return sorted(pairs, key=lambda pair: (pair[0].tuning is not None, order.index(pair[0].name), pair[0].num_fewshot))


def _output_errors(report: SparsityReport, say: Say) -> Any:
    figure = new_figure(8, 4)
    axes = figure.add_subplot()
    for kind in report.kinds():
        points = []
        for i, layer in enumerate(kind.layers):
            block = re.search(r"\.(\d{1,6})\.", layer.name)  # in some blocks the layer may be dense
            if layer.relative_output_error is not None:
                points.append((int(block[1]) if block else i, layer.relative_output_error))
        if points:
            name = kind.name.split(".*.")[-1].lstrip("_")  # matplotlib hides what begins with it
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=name)
    axes.set_xlabel(say("block"))
    axes.set_ylabel(say("relative output error"))
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _dense_and_sparse(pairs: list[Pair], say: Say) -> Any:
    panels: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        panels.setdefault(_panel(pair[0], say), []).append(pair)
    widths = [1 + len(rows) for rows in panels.values()]
    figure = new_figure(2 + sum(1 + 1.1 * len(rows) for rows in panels.values()), 3.6)
    grid = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    for axes, ((title, metric), rows) in zip(grid, panels.items(), strict=True):
        for offset, color, label, side in ((-0.2, _DENSE, "dense", 1), (0.2, _SPARSE, "sparse", 0)):
            heights = [pair[side].metrics[metric] for pair in rows]
            bars = axes.bar([i + offset for i in range(len(rows))], heights, 0.38, color=color, label=say(label))
            axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        axes.set_xticks(range(len(rows)), [_label(pair[0], say) for pair in rows])
        axes.set_title(title, fontsize=10)
        axes.margins(y=0.15)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _panel(row: Measurement, say: Say) -> tuple[str, str]:
    """The title of the panel that a measurement stands in, and the metric that it shows."""
    task = task_of(row.name)
    if row.name == "perplexity":
        return say("perplexity (lower is better)"), "perplexity"
    title = "{} F1 in % (higher is better)" if task.is_per_cent("f1") else "{} macro F1 (higher is better)"
    return say(title).format(task.suite or task.title), "f1"


def _label(row: Measurement, say: Say) -> str:
    shots = f"\n{row.num_fewshot}-shot" if row.num_fewshot != task_of(row.name).usual_shots else ""
    return row.name + shots + (f"\n{say('tuned')}" if row.tuning is not None else "")
