"""The card's figures, as PNG beside it."""

from __future__ import annotations

import functools
import re
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
    "without blocks": "블록을 뺀 모델",
    "tuned": "튜닝 후",
}
# Fonts with Hangul, as Linux, macOS and Windows have them; the first that is installed is taken.
_HANGUL_FONTS = (
    *("Pretendard", "Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "NanumBarunGothic"),
    *("Apple SD Gothic Neo", "AppleGothic", "Malgun Gothic", "Baekmuk Gulim", "UnDotum"),
)
_DENSE, _SPARSE = "#9aa5b1", "#1f6feb"

logger = logging.get_logger(__name__)


def draw_figures(
    directory: Path, report: SparsityReport | None, results: EvaluationResults | None, language: str = "en"
) -> dict[str, bool]:
    """Draws what there are data for; which figures were drawn. None without matplotlib, which is said once. The same
    data give the same bytes. Korean labels need a font that has Hangul; without one they are English."""
    drawn = {ERROR_FIGURE: False, RESULTS_FIGURE: False}
    for name in drawn:
        (directory / name).unlink(missing_ok=True)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        logger.warning_once(f"The card gets no figures: they need matplotlib: {install_hint('plot')}")
        return drawn
    words = _Words(_hangul_font() if language == "ko" else None)
    measured = report is not None and any(layer.relative_output_error is not None for layer in report.layers)
    if report is not None and measured and not report.changes:
        _save(_output_errors(report, words), directory / ERROR_FIGURE)
        drawn[ERROR_FIGURE] = True
    if results is not None and _drawable(results):
        _save(_dense_and_sparse(results, "sparse", words), directory / RESULTS_FIGURE)
        drawn[RESULTS_FIGURE] = True
    return drawn


class _Words:
    """The labels of a figure: Korean with a font that has Hangul, English without one."""

    def __init__(self, font: str | None) -> None:
        self.font = {} if font is None else {"fontfamily": [font, "sans-serif"]}

    def __call__(self, text: str) -> str:
        return _KOREAN.get(text, text) if self.font else text


@functools.cache
def _hangul_font() -> str | None:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return next((name for name in _HANGUL_FONTS if name in installed), None)


def _drawable(results: EvaluationResults) -> list[tuple[Measurement, Measurement]]:
    """Comparable pairs with finite figures, before tuning first."""
    found = [
        pair
        for pair in results.comparable()
        if pair[0].name in TASKS and all(row.metrics.get("perplexity", 0) is not None for row in pair)
    ]
    order = ["perplexity", *TASKS]
    return sorted(found, key=lambda pair: (pair[0].tuning is not None, order.index(pair[0].name), pair[0].num_fewshot))


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120, metadata={"Software": None})  # no version in it: the same data, the same bytes


def _output_errors(report: SparsityReport, words: _Words) -> Any:
    figure = _figure(8, 4)
    axes = figure.add_subplot()
    for kind in report.kinds():
        rows = [(_block(layer.name, i), layer.relative_output_error) for i, layer in enumerate(kind.layers)]
        points = [(block, error) for block, error in rows if error is not None]
        if points:
            name = kind.name.split(".*.")[-1]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=_plain(name))
    axes.set_xlabel(words("block"), **words.font)
    axes.set_ylabel(words("relative output error"), **words.font)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _block(name: str, otherwise: int) -> int:
    """The number of the block that a layer is in: in some blocks it may be dense."""
    found = re.search(r"\.(\d{1,6})\.", name)
    return int(found[1]) if found else otherwise


def _dense_and_sparse(results: EvaluationResults, ours: str, words: _Words) -> Any:
    pairs = _drawable(results)
    grouped: dict[tuple[str, str], list[tuple[Measurement, Measurement]]] = {}
    for pair in pairs:
        grouped.setdefault(_panel(pair[0], words), []).append(pair)
    panels = [(title, rows, metric) for (title, metric), rows in grouped.items()]
    figure = _figure(2 + sum(1 + 1.1 * len(rows) for _, rows, _ in panels), 3.6)
    widths = [1 + len(rows) for _, rows, _ in panels]
    for axes, (title, rows, metric) in zip(
        figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0], panels, strict=True
    ):
        for offset, color, label, side in ((-0.2, _DENSE, "dense", 1), (0.2, _SPARSE, ours, 0)):
            heights = [pair[side].metrics[metric] for pair in rows]
            places = [i + offset for i in range(len(rows))]
            bars = axes.bar(places, heights, 0.38, color=color, label=words(label))
            axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        axes.set_xticks(range(len(rows)), [_label(pair[0], words) for pair in rows], **words.font)
        axes.set_title(title, fontsize=10, **words.font)
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    prop = {"size": 8, **({"family": words.font["fontfamily"]} if words.font else {})}
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", prop=prop, frameon=False)
    return figure


def _panel(row: Measurement, words: _Words) -> tuple[str, str]:
    """The title of the panel that a measurement stands in, and the metric that it shows."""
    task = task_of(row.name)
    if row.name == "perplexity":
        return words("perplexity (lower is better)"), "perplexity"
    title = "{} F1 in % (higher is better)" if task.is_per_cent("f1") else "{} macro F1 (higher is better)"
    return words(title).format(task.suite or task.title), "f1"


def _label(row: Measurement, words: _Words) -> str:
    shots = f"\n{row.num_fewshot}-shot" if row.num_fewshot != task_of(row.name).usual_shots else ""
    return row.name + shots + (f"\n{words('tuned')}" if row.tuning is not None else "")


def _plain(text: str) -> str:
    """Without the signs that matplotlib reads as mathematics, or hides."""
    return text.replace("$", r"\$").lstrip("_")
