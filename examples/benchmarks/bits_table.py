"""Quality against bits a weight: a study's sparse models beside the dense model as libraries quantise it.

python examples/benchmarks/bits_table.py

Of each folder in `results/bits/` it reads `sparse.json`, of `bits_sparse.py`, and `dense.json`, of `bits.py`, and
writes `bits.png` beside the folders; `readme_tables.py` writes the table.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from optimum_ksparse.hub.figures import new_figure, save_figure
from optimum_ksparse.study import Spread, spread

FOLDER = Path(__file__).parent / "results" / "bits"
LIBRARIES = {"llmcompressor": "GPTQ", "torchao": "rounded"}
WORDS = {
    "en": {
        "head": "weights of the linear maps",
        "bits": "bits",
        "perplexity": "perplexity",
        "dense": "dense",
        "rounded": "rounded",
        "blocks": "blocks",
    },
    "ko": {
        "head": "선형층의 가중치",
        "bits": "비트",
        "perplexity": "퍼플렉시티",
        "dense": "밀집",
        "rounded": "반올림",
        "blocks": "블록",
    },
}
# Series of the figure: colour and marker.
STYLES = {
    "dense, GPTQ": ("#000000", "o"),
    "dense, rounded": ("#999999", "s"),
    "50 %": ("#0072B2", "^"),
    "50 %, blocks": ("#56B4E9", "v"),
    "2:4": ("#D55E00", "D"),
    "2:4, blocks": ("#E69F00", "P"),
}


class Point(NamedTuple):
    """A model: the series that it is one of, how its weights are stored, bits a weight, and perplexity."""

    series: str
    values: str
    bits: float
    perplexity: Spread


def read(folder: Path) -> tuple[Spread, list[Point]]:
    """Perplexity of the dense model, and the others, those with the most bits first."""
    cells: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for row in json.loads((folder / "sparse.json").read_text(encoding="utf-8")):
        blocks = ", blocks" if row.get("method") == "admm + block" else ""
        cells.setdefault((row["pattern"] + blocks, row["values"]), []).append(row)
    found = {cell: spread([row["perplexity"] for row in rows]) for cell, rows in cells.items()}
    points, dense = [], found.pop(("dense", None))
    for (pattern, values), perplexity in found.items():
        bits = cells[pattern, values][0]["bits_per_weight"]
        points.append(Point(pattern.replace("%", " %"), values or "16 bit", bits, perplexity))
    for row in json.loads((folder / "dense.json").read_text(encoding="utf-8")):
        series = f"dense, {LIBRARIES[row['library']]}"
        points.append(Point(series, f"int{row['bits']}", row["bits_per_weight"], Spread(row["perplexity"], None, 1)))
    return dense, sorted(points, key=lambda point: -point.bits)


def studies() -> dict[str, tuple[Spread, list[Point]]]:
    return {folder.name: read(folder) for folder in sorted(FOLDER.iterdir()) if folder.is_dir()}


def bits_table(language: str = "en") -> str:
    """A row for each way to store the weights, those with the most bits first; of each model bits and perplexity."""
    words, found = WORDS[language], studies()
    titles = [f"{name}: {words['bits']} | {words['perplexity']}" for name in found]
    lines = [f"| {words['head']} | {' | '.join(titles)} |", "|---" * (1 + 2 * len(found)) + "|"]
    lines.append(f"| {words['dense']} | {' | '.join(f'16.00 | {dense.text(2)}' for dense, _ in found.values())} |")
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for name, (_, points) in found.items():
        for point in points:
            cells.setdefault((point.series, point.values), {})[name] = point
    most_first = sorted(cells.items(), key=lambda cell: -next(iter(cell[1].values())).bits)
    for (series, values), row in most_first:
        text = [f"{row[name].bits:.2f} | {row[name].perplexity.text(2)}" if name in row else " | " for name in found]
        for word in ("dense", "rounded", "blocks"):
            series = series.replace(word, words[word])
        lines.append(f"| {series}, {values} | {' | '.join(text)} |")
    return "\n".join(lines) + "\n"


def draw(path: Path) -> None:
    """A panel for each model: perplexity against bits, a line for each series, the dense model as a dashed line."""
    found = studies()
    figure = new_figure(5.2 * len(found), 4.4)
    for number, (name, (dense, points)) in enumerate(found.items(), start=1):
        axes = figure.add_subplot(1, len(found), number)
        axes.axhline(dense.mean, color="#444444", linestyle="--", linewidth=1, label="dense, 16 bit")
        for series, (color, marker) in STYLES.items():
            line = [point for point in points if point.series == series]
            x, y = [p.bits for p in line], [p.perplexity.mean for p in line]
            if any(value < 3 * dense.mean for value in y):
                axes.plot(x, y, color=color, marker=marker, linewidth=1, label=series)
        axes.set_ylim(0.9 * dense.mean, 3 * dense.mean)  # what lies above is in the table
        axes.set_xlabel("bits for each weight of the linear maps")
        axes.set_ylabel("perplexity")
        axes.set_title(name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    draw(FOLDER / "bits.png")
    print(bits_table())
