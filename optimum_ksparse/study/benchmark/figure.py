"""The figure: speed-up against the number of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .results import BenchResults

FIGURE_NAME = "speedup.png"
# A packed weight at half density takes half of the values and four bits of mask for every four weights.
_LIMITS = {"bfloat16": 16 / 9, "float16": 16 / 9, "float32": 32 / 17}


def draw_speedup(results: BenchResults, path: Path) -> bool:
    """Draws the speed-up of what the dispatch takes: a panel for each pattern and dtype, a line for each shape, and
    the limit of a product that is bound by memory. False, and nothing written, without matplotlib or rows."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = results.chosen()
    if not rows:
        return False
    panels = sorted({(row["pattern"], row["dtype"]) for row in rows})
    shapes = sorted({tuple(row["shape"]) for row in rows}, key=lambda shape: (-shape[0] * shape[1], shape))
    figure = Figure(figsize=(2 + 5 * len(panels), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        _draw_panel(axes, [row for row in rows if (row["pattern"], row["dtype"]) == panel], shapes, panel)
    figure.suptitle(f"Speed of sparse layers beside dense ones, {results.hardware['device']}", fontsize=11)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False, title="out x in")
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return True


def _draw_panel(axes: Any, rows: list[dict[str, Any]], shapes: list[Any], panel: tuple[str, str]) -> None:
    tokens = sorted({row["tokens"] for row in rows})
    for shape in shapes:
        points = sorted((row["tokens"], row["speedup"]) for row in rows if tuple(row["shape"]) == shape)
        line = zip(*points, strict=True) if points else ([], [])
        axes.plot(*line, marker="o", markersize=4, linewidth=1.4, label=f"{shape[0]} x {shape[1]}")
    limit = _LIMITS.get(panel[1], 16 / 9)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axhline(limit, color="black", linewidth=0.8, linestyle="--")
    axes.annotate(f"limit of memory {limit:.2f}", (tokens[-1], limit), ha="right", va="bottom", fontsize=8)
    axes.annotate("dense", (tokens[-1], 1), ha="right", va="bottom", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(number) for number in tokens], fontsize=8)
    axes.minorticks_off()
    axes.set_ylim(0, 1.15 * max(limit, *(row["speedup"] for row in rows)))
    axes.set_xlabel("tokens in a product")
    axes.set_ylabel("speed-up over F.linear")
    axes.set_title(" ".join(panel), fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
