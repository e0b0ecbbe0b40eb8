"""Perplexity of the models of a study on texts that its calibration never saw.

python examples/benchmarks/unseen_texts.py MODEL STUDY RESULTS.jsonl --texts NAME=FILE[:FIELD]… english

MODEL is the dense model, STUDY the output of `optimum-cli ksparse study` with `keep_checkpoints: true`. Each model is
measured on the first windows of 512 tokens of each text; FIELD is that of the JSON lines (`text`), `english` without
a file is Python's own documentation. What RESULTS holds already is not measured again; a table closes, with mean ±
sample standard deviation over the seeds.
"""

import argparse
import json
from pathlib import Path

import english
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from optimum_ksparse import evaluate_perplexity
from optimum_ksparse.nn import densified
from optimum_ksparse.study import StudyResults, load_study, spread

LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "study", "results"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=24)
    args = parser.parse_args()
    logging.set_verbosity_error()
    texts, study = dict(map(read, args.texts)), load_study(args.study)
    lines = args.results.read_text(encoding="utf-8").splitlines() if args.results.exists() else []
    rows = [json.loads(line) for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for cell in study.record.cells:
        folder = args.model if cell == "dense" else args.study / "cells" / cell / "checkpoint"
        missing = [name for name in texts if (cell, name) not in {(row["cell"], row["text"]) for row in rows}]
        if not missing or not (folder / "config.json").is_file():
            continue
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        for name in missing:
            with densified(model):  # every pass on the CPU would decompress the packed weights anew
                found = evaluate_perplexity(
                    model, tokenizer, texts[name], seq_len=LENGTH, max_tokens=args.windows * LENGTH, batch_size=4
                )
            rows.append({"cell": cell, "text": name, **found})
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table(study, rows, list(texts)))


def read(text: str) -> tuple[str, list[str]]:
    """The name and the texts, each once."""
    name, _, place = text.partition("=")
    if not place:
        return name, english.PAGES
    path, _, field = place.partition(":")
    found = [json.loads(line)[field or "text"] for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return name, list(dict.fromkeys(found))


def table(study: StudyResults, rows: list[dict], texts: list[str]) -> str:
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        place = study.record.cells[row["cell"]].places[0]
        kind = found.setdefault((place.method, "" if place.method == place.pattern else place.pattern), {})
        kind.setdefault(row["text"], []).append(row["perplexity"])
    lines = [f"| method | pattern | {' | '.join(texts)} |", "|" + "---|" * (2 + len(texts))]
    for (method, pattern), values in found.items():
        figures = [spread(values[name]).text(2) if name in values else "" for name in texts]
        lines.append(f"| {method} | {pattern} | {' | '.join(figures)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
