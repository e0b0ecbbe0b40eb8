"""Writes what the files in `results/` hold into READMEs and pages of `docs/`, between the marks of their tables.

python examples/benchmarks/readme_tables.py
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bits_table import bits_table
from cpu_speed_table import decoding_table, readme_table

from optimum_ksparse.pruners import METHODS
from optimum_ksparse.study import Spread
from optimum_ksparse.study.benchmark import BenchResults, weights_of

HERE = Path(__file__).parent
_ROOT = HERE.parents[1]
PAGES = {
    "en": [_ROOT / "README.md", *(_ROOT / f"docs/{page}.md" for page in ("prune", "speed", "results"))],
    "ko": [_ROOT / "README_ko.md", *(_ROOT / f"docs/{page}.ko.md" for page in ("prune", "speed", "results"))],
}
TABLES = ("quality", "decoding", "methods", "cpu-avx2", "cpu-avx512", "cpu-amx", "speed", "bits")
CPUS = [HERE / "results" / f"cpu-{unit}-2-threads" / "results.json" for unit in ("avx2", "avx512", "amx")]
STUDY = HERE / "results" / "study-gemma-3-270m-methods" / "results.json"
TITLES = {
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

# Of a layer [out, in]: time, and memory beside weight and Gram matrix in float32.
COSTS = {
    "wanda": ("a sort", ""),
    "sparsegpt": ("a factorisation and a sweep", "4 in², 3 out·in"),
    "admm": ("an inverse, with n:m three, and 20 products out·in²", "4 in², 11 out·in"),
    "alps": ("an `eigh` in float64 and up to 600 products", "9 in², 20 out·in"),
}
_METHODS_HEAD = {
    "en": "| `method` | what it does | time of a layer [out, in] | memory beside weight and Gram matrix, float32 |",
    "ko": "| `method` | 하는 일 | [out, in] 층 하나의 시간 | 가중치와 그람 행렬 밖의 메모리(float32) |",
}
# Of each method, in the place of its summary and its time.
_TRANSLATED = {
    "magnitude": ("절댓값이 작은 가중치를 지웁니다. 데이터가 필요 없습니다", ""),
    "wanda": ("|W|·‖X‖가 작은 것을 지웁니다. 남은 가중치는 그대로입니다", "정렬 한 번"),
    "sparsegpt": ("열을 차례로 훑으며 잘라 낸 만큼을 뒤의 열이 메웁니다", "행렬 분해와 훑기 한 번"),
    "admm": ("가중치와 마스크를 함께 구하고, 마스크가 움직입니다", "역행렬 하나(n:m은 셋)와 out·in² 곱 20번"),
    "alps": ("벌점을 키워 가며 ADMM을 하고, 찾은 마스크 위에서 최소제곱을 풉니다", "float64 `eigh`와 곱 최대 600번"),
    "existing": (
        "이미 있는 0을 그대로 두고 아무것도 바꾸지 않습니다. 다른 곳에서 가지치기한 모델을 위한 것이며, "
        "데이터가 필요 없습니다",
        "",
    ),
}

# Tokens in a product, as people meet them.
_RANGES = ((1, 1), (2, 32), (64, 256), (512, 4096))
# Compute capabilities of Ampere; 8.9 is Ada.
_AMPERE = ("8.0", "8.6", "8.7")
_TEXTS: dict[str, dict[str, Any]] = {
    "en": {
        "head": "| hardware | pattern, dtype | tokens | speed-up | kernels taken |",
        "models": "| hardware | whole model | pattern, dtype | prefill | decoding | CUDA graphs |",
        "to": "{:.2f} to {:.2f}",
        "yes": ("no", "yes"),
        "threads": "{}, {} threads",
        "gpu": "**Not measured yet on any NVIDIA GPU**: the kernels are compiled for Ampere, Hopper and Blackwell in "
        "the tests, and what they compute is tested in Triton's interpreter; how fast they are has not been seen.",
        "ampere": "Ampere itself is compiled for and not measured.",
        "shapes": "Ranges are over {} shapes of {:,} to {:,} dense bytes.",
    },
    "ko": {
        "head": "| 하드웨어 | 패턴, dtype | 토큰 | 밀집 대비 속도 | 쓰인 커널 |",
        "models": "| 하드웨어 | 모델 전체 | 패턴, dtype | 프리필 | 디코딩 | CUDA 그래프 |",
        "to": "{:.2f}~{:.2f}",
        "yes": ("아니요", "예"),
        "threads": "{}, 스레드 {}개",
        "gpu": "**NVIDIA GPU에서는 아직 측정하지 않았습니다.** 테스트가 커널을 Ampere, Hopper, Blackwell용으로 "
        "컴파일하고 계산 결과를 Triton 인터프리터로 확인하지만, 얼마나 빠른지는 아직 보지 못했습니다.",
        "ampere": "Ampere용으로는 컴파일만 하고 측정하지 않았습니다.",
        "shapes": "범위는 밀집 {1:,}~{2:,}바이트인 모양 {0}개에 걸친 값입니다.",
    },
}


def filled(text: str, language: str) -> str:
    """A page with the tables as the files have them now."""
    results = [BenchResults.load(path) for path in sorted((HERE / "results").glob("*.json"))]
    measured = [json.loads(path.read_text(encoding="utf-8")) for path in CPUS]
    cpus = [readme_table(one, language) for one in measured]
    short = quality_table(language), decoding_table(measured[1], language)
    tables = *short, methods_table(language), *cpus, speed_table(results, language), bits_table(language)
    for name, table in zip(TABLES, tables, strict=True):
        pattern = f"(?<=<!-- {name} table -->\n).*?(?=<!-- /{name} table -->)"
        text = re.sub(pattern, lambda _, new=table: new, text, count=1, flags=re.DOTALL)
    return text


def quality_table(language: str) -> str:
    """Each method's perplexity by pattern, and the seconds that it took at 2:4."""
    rows = json.loads(STUDY.read_text(encoding="utf-8"))["rows"]
    found = {(row["figure"], row["method"], row["pattern"]): row for row in rows}

    def figure(name: str, method: str, pattern: str, digits: int) -> str:
        row = found.get((name, method, pattern))
        if row is None:
            return ""
        text = Spread(row["mean"], row["deviation"], row["seeds"]).text(digits)
        return text.replace(" ", "\N{NO-BREAK SPACE}")

    words = WORDS[language]
    title = words["title"].format(dense=found["perplexity", "dense", "dense"]["mean"])
    lines = [f"| {title} | 2:4 | 4:8 | 50 % | {words['seconds']} |", "|---|---|---|---|---|"]
    for method, name in TITLES.items():
        figures = [figure("perplexity", method, pattern, 1) for pattern in ("2:4", "4:8", "50%")]
        figures.append(figure("pruning_seconds", method, "2:4", 0))
        lines.append(f"| {name.format(then=words['then'])} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def methods_table(language: str) -> str:
    """A row for each method of the library; in English where nobody has translated it."""
    lines = [_METHODS_HEAD[language], "|---|---|---|---|"]
    for name, method in METHODS.items():
        time, memory = COSTS.get(name, ("", ""))
        summary, time = _TRANSLATED.get(name, (method.summary, time)) if language == "ko" else (method.summary, time)
        paper = re.search(r"eprint = {(.*)}", method.citation)
        link = f" ([{paper[1]}](https://arxiv.org/abs/{paper[1]}))" if paper else ""
        lines.append(f"| `{name}` | {summary.replace('|', '&#124;')}{link} | {time} | {memory} |")
    return "\n".join(lines) + "\n"


def speed_table(results: Sequence[BenchResults], language: str = "en") -> str:
    """Markdown of what was measured, and of what was not.

    Args:
        results: any number of result files.
        language: "en" or "ko".
    """
    texts = _TEXTS[language]
    lines: list[str] = []
    rows = [row for one in results for row in _rows(one, texts)]
    if rows:
        lines += [texts["head"], "|---|---|---|---|---|", *rows, ""]
        every = [row for one in results for row in one.chosen()]
        sizes = sorted({row["dense_bytes"] for row in every})
        shapes = len({tuple(row["shape"]) for row in every})
        lines += [texts["shapes"].format(shapes, sizes[0], sizes[-1]), ""]
    models = [row for one in results for row in _models(one, texts)]
    if models:
        lines += [texts["models"], "|---|---|---|---|---|---|", *models, ""]
    capabilities = [str(one.hardware["capability"]) for one in results if "capability" in one.hardware]
    if not capabilities:
        lines.append(texts["gpu"])
    elif not set(_AMPERE) & set(capabilities):
        lines.append(texts["ampere"])
    return "\n".join(lines).strip() + "\n"


def _rows(results: BenchResults, texts: dict[str, Any]) -> list[str]:
    lines = []
    for weights in dict.fromkeys(weights_of(row) for row in results.chosen()):
        for least, most in _RANGES:
            rows = [row for row in results.chosen() if weights_of(row) == weights and least <= row["tokens"] <= most]
            if rows:
                numbers = sorted({row["tokens"] for row in rows})
                tokens = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"
                speed = _span([row["speedup"] for row in rows], texts)
                names = ", ".join(dict.fromkeys(row["kernel"] for row in rows))
                machine = _name(results, texts)
                lines.append(f"| {machine} | {', '.join(weights)} | {tokens} | {speed} | {names} |")
    return lines


def _models(results: BenchResults, texts: dict[str, Any]) -> list[str]:
    return [
        f"| {_name(results, texts)} | {row['model']} | {', '.join(weights_of(row))} | "
        f"{row['prefill_speedup']:.2f} | {row['decode_speedup']:.2f} | {texts['yes'][row['cuda_graphs']]} |"
        for row in results.models
    ]


def _span(values: list[float], texts: dict[str, Any]) -> str:
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return least if least == most else texts["to"].format(min(values), max(values))


def _name(results: BenchResults, texts: dict[str, Any]) -> str:
    device, threads = results.hardware["device"], results.hardware.get("threads")
    return texts["threads"].format(device, threads) if threads else str(device)


if __name__ == "__main__":
    for language, pages in PAGES.items():
        for path in pages:
            path.write_text(filled(path.read_text(encoding="utf-8"), language), encoding="utf-8")
            print(f"written: {path.name}")
