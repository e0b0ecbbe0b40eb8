"""The table and the figure of `cpu_speed.py`, and their short forms in docs and README, from its results.json."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
DENSE = ("float32", "bfloat16")
KINDS = {
    "dense": "#9aa5b1",
    "dense, oneDNN off": "#5b6570",
    "packed": "#1f6feb",
    "packed int8": "#2da44e",
    "packed int4": "#8250df",
    "llama.cpp": "#d1702c",
}
CALM = 0.1  # the largest share of the processors' time that others may take
WORDS = {
    "en": {
        "layers": "| packed weights of a layer, {threads} threads | tokens | × dense float32 | × dense bfloat16 |",
        "models": "| whole model, tokens per second | MB | prefill | decoding |",
        "decoding": "| tokens per second (MB) | dense | packed | packed int8 | packed int4 | llama.cpp Q8_0 |",
        "to": "{:.1f} ({:.1f} to {:.1f})",
        "any": "{dtype}, any pattern",
        "dense": "dense {dtype}",
        "dense, oneDNN off": "dense {dtype}, oneDNN off",
        "packed": "**packed 2:4 {dtype}**",
        "packed int8": "**packed 2:4 int8** in {dtype}",
        "packed int4": "**packed 2:4 int4** in {dtype}",
        "llama.cpp": "llama.cpp {dtype}",
    },
    "ko": {
        "layers": "| 층의 압축 가중치, 스레드 {threads}개 | 토큰 | 밀집 float32의 몇 배 | 밀집 bfloat16의 몇 배 |",
        "models": "| 모델 전체, 초당 토큰 | MB | 프리필 | 디코딩 |",
        "decoding": "| 초당 토큰 (MB) | 밀집 | 압축 | 압축 int8 | 압축 int4 | llama.cpp Q8_0 |",
        "to": "{:.1f} ({:.1f}~{:.1f})",
        "any": "{dtype}, 어떤 패턴이든",
        "dense": "밀집 {dtype}",
        "dense, oneDNN off": "밀집 {dtype}, oneDNN 없이",
        "packed": "**압축 2:4 {dtype}**",
        "packed int8": "**압축 2:4 int8**, {dtype}",
        "packed int4": "**압축 2:4 int4**, {dtype}",
        "llama.cpp": "llama.cpp {dtype}",
    },
}


def ratios(rows: Iterable[dict[str, Any]], dense: str) -> list[float]:
    """How many times as fast as a dense product in this dtype, where that was measured."""
    return [row["rivals_us"][dense] / row["sparse_us"] for row in rows if dense in row["rivals_us"]]


def calm(rows: Rows) -> Rows:
    """Those that were measured while others took at most a tenth of the processors' time."""
    return [row for row in rows if row["others"] <= CALM]


def span(values: list[float], form: str) -> str:
    """The median, the least and the greatest value."""
    return form.format(statistics.median(values), min(values), max(values)) if values else ""


def readme_table(results: dict[str, Any], language: str) -> str:
    """Layers at 1, 16 and 256 tokens over all shapes, and whole models."""
    words, layers = WORDS[language], calm(results["layers"])
    lines = [words["layers"].format(threads=max(row["threads"] for row in layers)), "|---|---|---|---|"]
    for dtype in ("bfloat16", "float32", "float16"):
        for tokens in (1, 16, 256):
            rows = [row for row in layers if (row["dtype"], row["tokens"]) == (dtype, tokens)]
            if not rows:
                continue
            cells = [words["any"].format(dtype=dtype), str(tokens)]
            lines.append(f"| {' | '.join([*cells, *(span(ratios(rows, dense), words['to']) for dense in DENSE)])} |")
    lines += ["", words["models"], "|---|---|---|---|"]
    for row in models(results):
        name = f"{row['model']}, {words[row['kind']].format(dtype=row['dtype'])}"
        lines.append(f"| {name} | {row['bytes'] / 1e6:,.0f} | {' | '.join(_rates(row))} |")
    return "\n".join(lines) + "\n"


def decoding_table(results: dict[str, Any], language: str) -> str:
    """Decoding in bfloat16 by whole models, of which those without oneDNN count as well where they are faster."""
    rows = models(results)
    lines = [WORDS[language]["decoding"], "|---|---|---|---|---|---|"]
    kinds = [("dense", "bfloat16"), *((f"packed{values}", "bfloat16") for values in ("", " int8", " int4"))]
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = []
        for kind, dtype in [*kinds, ("llama.cpp", "Q8_0")]:
            some = [
                row
                for row in rows
                if (row["model"], row["kind"].removesuffix(", oneDNN off"), row["dtype"]) == (model, kind, dtype)
            ]
            best = max(some, key=lambda row: row["decoding"], default=None)
            cells.append(f"{best['decoding']:.1f} ({best['bytes'] / 1e6:,.0f})" if best else "")
        lines.append(f"| {' | '.join([model, *cells])} |")
    return "\n".join(lines) + "\n"


def models(results: dict[str, Any]) -> Rows:
    """A row for each model and kind with most threads."""
    rows = calm(results["models"])
    most = max(row["threads"] for row in rows)
    return [
        row
        for model in sorted({row["model"] for row in rows})
        for kind in KINDS
        for row in sorted(rows, key=lambda row: -row["bytes"])
        if (row["model"], row["kind"], row["threads"]) == (model, kind, most)
    ]


def _rates(row: dict[str, Any]) -> list[str]:
    values = row["prefill"], row["decoding"]
    return ["" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}" for value in values]


def write_table(results: dict[str, Any], path: Path) -> None:
    """All that was measured, in Markdown."""
    lines = [f"{results['hardware']['device']} ({results['hardware']['unit']}), torch {results['versions']['torch']}"]
    head = ["out x in", "pattern", "dtype", "tokens", "packed µs", "dense float32 µs", "dense bfloat16 µs"]
    results = {name: calm(rows) if isinstance(rows, list) else rows for name, rows in results.items()}
    rows = results.get("layers", [])
    cells = [[*_product(row), row["sparse_us"], *(row["rivals_us"].get(d) for d in DENSE)] for row in rows]
    lines += _markdown([*head, "× float32", "× bfloat16"], [[*some, *_times(some[4:])] for some in cells])
    keys = ["dense", "dense, oneDNN off", "bfloat16", "int8", "int4"]
    names = [f"{'' if 'dense' in key else 'packed '}{key} µs" for key in keys]
    cells = [
        ["{} x {}".format(*row["shape"]), *_cells([row], ["pattern", *keys])[0]] for row in results.get("values", [])
    ]
    lines += _markdown(["one token, out x in", "pattern", *names], cells)
    keys = ["dtype", "tokens", "torch", "torch, oneDNN off", "native"]
    names = [*keys[:2], *(f"{key} µs" for key in keys[2:])]
    some = results.get("dense", [])
    cells = [["{} x {}".format(*row["shape"]), *_cells([row], keys)[0]] for row in some]
    lines += _markdown(["dense, out x in", *names], cells)
    rows = results.get("backward", [])
    cells = [[*_product(row), row["of"], row["packed_us"], row["dense_float32_us"]] for row in rows]
    head = [*head[:4], "gradient of the", *head[4:6], "× float32"]
    lines += _markdown(head, [[*some, *_times(some[5:])] for some in cells])
    keys = ["model", "kind", "dtype", "threads", "bytes", "prefill", "decoding"]
    lines += _markdown([*keys[:5], "prefill tokens/s", "decoding tokens/s"], _cells(results.get("models", []), keys))
    keys = ["call", "threads", "us"]
    lines += _markdown(keys, _cells(results.get("calls", []), keys))
    keys = ["model", "products", "threads", "apart_us", "fused_us"]
    lines += _markdown(keys, _cells(results.get("fusing", []), keys))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _product(row: dict[str, Any]) -> list[Any]:
    return [f"{row['shape'][0]} x {row['shape'][1]}", row["pattern"], row["dtype"], row["tokens"]]


def _times(microseconds: list[float | None]) -> list[float | None]:
    packed, *dense = microseconds
    return [None if one is None or packed is None else one / packed for one in dense]


def _cells(rows: Rows, keys: list[str]) -> list[list[Any]]:
    return [[row[key] for key in keys] for row in rows]


def _markdown(head: list[str], rows: list[list[Any]]) -> list[str]:
    if not rows:
        return []
    texts = [["" if c is None else f"{c:.2f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    return ["", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *texts))]


def write_figure(results: dict[str, Any], path: Path) -> None:
    """Tokens per second of decoding against bytes of the model: a panel for each model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not calm(results.get("models", [])):
        return
    rows = models(results)
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(1.2 + 5 * len(names), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for kind, color in KINDS.items():
            some = [row for row in rows if (row["model"], row["kind"]) == (name, kind)]
            label = kind.replace("packed", "packed 2:4")
            points = [row["bytes"] / 1e6 for row in some], [row["decoding"] for row in some]
            if some:
                axes.plot(*points, "o", color=color, markersize=8, label=label)
            for row in some if "int" not in kind else []:  # those lie side by side, and have one dtype
                place = row["bytes"] / 1e6, row["decoding"]
                left = kind.startswith("packed")
                offset = (-7 if left else 7, -12 if kind.startswith("dense") else 5)
                style: Any = {"fontsize": 8, "color": color, "ha": "right" if left else "left"}
                axes.annotate(row["dtype"], place, offset, textcoords="offset points", **style)
        axes.set_xlim(0, 1.2 * max(row["bytes"] for row in rows if row["model"] == name) / 1e6)
        axes.set_ylim(0, 1.15 * max(row["decoding"] for row in rows if row["model"] == name))
        axes.set_xlabel("bytes of the model, MB")
        axes.set_ylabel("decoded tokens per second")
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    threads = max(row["threads"] for row in rows)
    figure.suptitle(f"Decoding on {results['hardware']['device']}, {threads} threads", fontsize=11)
    figure.savefig(path, dpi=130, metadata={"Software": None})
