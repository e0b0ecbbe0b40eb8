"""Writes what the files in `results/` hold into README.md and README_ko.md, between the marks of their tables.

python examples/benchmarks/readme_tables.py
"""

import json
import re
from pathlib import Path

from optimum_ksparse.study import Spread
from optimum_ksparse.study.benchmark import BenchResults, speed_table

HERE = Path(__file__).parent
READMES = {"en": HERE.parents[1] / "README.md", "ko": HERE.parents[1] / "README_ko.md"}
TABLES = ("quality", "speed")
STUDY = HERE / "results" / "study-gemma-3-270m-methods" / "results.json"
METHODS = {
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "alps": "ALPS",
    "admm": "**ADMM**: `SparsityConfig()`",
    "admm + block": '**{then}**: `SparsityConfig(reconstruct="block")`',
}
WORDS = {
    "en": {"title": "perplexity (dense {dense:.2f})", "seconds": "seconds for 2:4", "then": "ADMM, then blocks"},
    "ko": {"title": "퍼플렉시티 (원본 {dense:.2f})", "seconds": "2:4에 걸린 초", "then": "ADMM과 블록 재구성"},
}


def filled(text: str, language: str) -> str:
    """A README with the tables as the files have them now."""
    results = [BenchResults.load(path) for path in sorted((HERE / "results").glob("*.json"))]
    for name, table in zip(TABLES, (quality_table(language), speed_table(results, language)), strict=True):
        pattern = f"(?<=<!-- {name} table -->\n).*?(?=<!-- /{name} table -->)"
        text = re.sub(pattern, lambda _, new=table: new, text, count=1, flags=re.DOTALL)
    return text


def quality_table(language: str) -> str:
    """Each method's perplexity by pattern, and the seconds that it took at 2:4."""
    rows = json.loads(STUDY.read_text(encoding="utf-8"))["rows"]
    found = {(row["figure"], row["method"], row["pattern"]): row for row in rows}

    def figure(name: str, method: str, pattern: str, digits: int) -> str:
        row = found.get((name, method, pattern))
        return "" if row is None else Spread(row["mean"], row["deviation"], row["seeds"]).text(digits)

    words = WORDS[language]
    title = words["title"].format(dense=found["perplexity", "dense", "dense"]["mean"])
    lines = [f"| {title} | 2:4 | 4:8 | 50 % | {words['seconds']} |", "|---|---|---|---|---|"]
    for method, name in METHODS.items():
        figures = [figure("perplexity", method, pattern, 1) for pattern in ("2:4", "4:8", "50%")]
        figures.append(figure("pruning_seconds", method, "2:4", 0))
        lines.append(f"| {name.format(then=words['then'])} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for language, path in READMES.items():
        path.write_text(filled(path.read_text(encoding="utf-8"), language), encoding="utf-8")
        print(f"written: {path.name}")
