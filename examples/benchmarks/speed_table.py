"""Writes what `results/*.json` hold between the `speed table` marks of README.md and README_ko.md.

python examples/benchmarks/speed_table.py
"""

import re
from pathlib import Path

from optimum_ksparse.benchmark import BenchResults, speed_table

HERE = Path(__file__).parent
READMES = {"en": HERE.parents[1] / "README.md", "ko": HERE.parents[1] / "README_ko.md"}
MARKS = "<!-- speed table -->\n", "<!-- /speed table -->"


def filled(text: str, language: str) -> str:
    """A README with the table as the files have it now."""
    results = [BenchResults.load(path) for path in sorted((HERE / "results").glob("*.json"))]
    pattern = f"(?<={re.escape(MARKS[0])}).*?(?={re.escape(MARKS[1])})"
    return re.sub(pattern, lambda _: speed_table(results, language), text, count=1, flags=re.DOTALL)


if __name__ == "__main__":
    for language, path in READMES.items():
        path.write_text(filled(path.read_text(encoding="utf-8"), language), encoding="utf-8")
        print(f"written: {path.name}")
