"""Quality against bits a weight: a study's sparse models beside the dense model as libraries quantise it.

python examples/benchmarks/bits_table.py

Of each folder in `results/bits/` it reads `results.json`, of `optimum-cli ksparse study` with `values`, and
`dense.json`, of `bits.py`, and writes `bits.md` and `bits.png` beside the folders.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from optimum_ksparse.hub.figures import new_figure, save_figure
from optimum_ksparse.study import Spread

FOLDER = Path(__file__).parent / "results" / "bits"
LIBRARIES = {"llmcompressor": "GPTQ", "torchao": "rounded"}
WORDS = {
    "en": {
        "head": "weights of the linear maps",
        "bits": "bits",
        "perplexity": "perplexity",
        "dense": "dense",
        "block": "blocks",
        "rounded": "rounded",
    },
    "ko": {
        "head": "선형층의 가중치",
        "bits": "비트",
        "perplexity": "퍼플렉시티",
        "dense": "밀집",
        "block": "블록 재구성",
        "rounded": "반올림",
    },
}
# Series of the figure: colour and marker.
STYLES = {
    "dense, GPTQ": ("#000000", "o"),
    "dense, rounded": ("#999999", "s"),
    "50 %": ("#0072B2", "^"),
    "50 %, block": ("#0072B2", "v"),
    "2:4": ("#D55E00", "D"),
    "2:4, block": ("#D55E00", "P"),
}


class Point(NamedTuple):
    """A model: the series that it is one of, how its weights are stored, bits a weight, and perplexity."""

    series: str
    values: str
    bits: float
    perplexity: Spread


def read(folder: Path) -> tuple[Spread, list[Point]]:
    """Perplexity of the dense model, and the others, those with the most bits first."""
    rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
    found = {(row["figure"], row["method"], row["pattern"]): row for row in rows}
    points, dense = [], Spread(0, None, 0)
    for (figure, method, pattern), row in found.items():
        if figure != "perplexity":
            continue
        spread = Spread(row["mean"], row["deviation"], row["seeds"])
        if pattern == "dense":
            dense = spread
            continue
        name, *rest = method.split(" int")
        series = pattern.replace("%", " %") + (", block" if "block" in name else "")
        bits = found["bits_per_weight", method, pattern]["mean"]
        points.append(Point(series, f"int{rest[0]}" if rest else "16 bit", bits, spread))
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
    for (series, values), row in cells.items():
        text = [f"{row[name].bits:.2f} | {row[name].perplexity.text(2)}" if name in row else " | " for name in found]
        for word in ("dense", "block", "rounded"):
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
            if line:
                axes.plot(x, y, color=color, marker=marker, linewidth=1, label=series)
        axes.set_yscale("log")
        axes.set_xlabel("bits for each weight of the linear maps")
        axes.set_ylabel("perplexity")
        axes.set_title(name)
        axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    (FOLDER / "bits.md").write_text(bits_table(), encoding="utf-8")
    draw(FOLDER / "bits.png")
    print(f"written to {FOLDER}")
