"""Perplexity of pruned models on several texts, some of which the calibration data have nothing of, as JSON lines.

python examples/benchmarks/quality.py MODEL CALIBRATION.jsonl RESULTS.jsonl --texts NAME=FILE[:FIELD]… --runs RUN…

A run is METHOD:PATTERN[:SETTING=VALUE]…, as `admm:2of4:reconstruct=block:seed=1`; `none` is no pattern, which goes
with `drop_layers=K`. Every run and the dense model are pruned in float32 on 32 samples of 512 tokens, in batches of 4,
and measured on the first windows of 512 of each text; FIELD is that of the JSON lines (`text`); `english` without a
file is Python's own documentation. Runs that RESULTS holds already are not done again; a table of all closes.
"""

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from optimum_ksparse import SparsityConfig, evaluate_perplexity

LENGTH = 512
COMMON = {"num_samples": 32, "seq_len": LENGTH, "batch_size": 4, "densify": "lazy"}


def read(text: str) -> tuple[str, list[str]]:
    name, _, place = text.partition("=")
    if not place:
        return name, [topics[key] for key in sorted(topics)]
    path, _, field = place.partition(":")
    rows = [json.loads(line)[field or "text"] for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return name, list(dict.fromkeys(rows))


def config_of(run: str, calibration: str) -> SparsityConfig:
    method, pattern, *settings = run.split(":")
    values = dict(COMMON)
    for name, _, value in (setting.partition("=") for setting in settings):
        values[name] = json.loads(value) if value[0].isdigit() or value in ("true", "false") else value
    pattern = None if pattern == "none" else pattern.replace("of", ":")
    return SparsityConfig(method, pattern, dataset=calibration, **values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "results"):
        parser.add_argument(name)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--runs", nargs="+", default=[])
    parser.add_argument("--windows", type=int, default=24)
    args = parser.parse_args()
    logging.set_verbosity_error()
    texts, results = dict(map(read, args.texts)), Path(args.results)
    configs = {"dense": None} | {run: config_of(run, args.calibration) for run in args.runs}
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    done = {row["run"] for row in rows if row["model"] == Path(args.model).name}
    for run in (run for run in configs if run not in done):
        rows.append(measure(run, configs[run], args, tokenizer, texts))
        with results.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    print(f"| run | seconds | {' | '.join(texts)} |\n|---|---|{'---|' * len(texts)}")
    for row in rows:
        figures = " | ".join(f"{row['perplexity'].get(name, float('nan')):.2f}" for name in texts)
        print(f"| {row['model']} {row['run']} | {row['seconds']} | {figures} |")


def measure(run, config, args, tokenizer, texts) -> dict:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, sparsity_config=config)
    row = {"model": Path(args.model).name, "run": run, "seconds": None, "windows": args.windows}
    if config is not None:
        row["seconds"] = model.sparsity_report.seconds
        row["blocks"] = [(block.loss_before, block.loss_after) for block in model.sparsity_report.reconstruction]
    row["perplexity"] = {
        name: evaluate_perplexity(
            model, tokenizer, text, seq_len=LENGTH, max_tokens=args.windows * LENGTH, batch_size=4
        )["perplexity"]
        for name, text in texts.items()
    }
    versions = {name: importlib.metadata.version(name) for name in ("optimum-ksparse", "torch", "transformers")}
    row["hardware"] = {"machine": platform.machine(), "threads": torch.get_num_threads(), **versions}
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()
