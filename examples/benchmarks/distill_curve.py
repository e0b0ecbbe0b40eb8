"""Perplexity against tokens of distillation: one run of `ksparse finetune distill`, measured on the way.

python examples/benchmarks/distill_curve.py DENSE SPARSE TEXT.jsonl VALIDATION.jsonl OUT [settings of the command]

The tuned model goes into OUT; OUT/curve.json holds perplexity and tokens of each measurement, what dense and sparse
model have by the same protocol, and the settings. A run that was cut off goes on when it is called again.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_ksparse import evaluate_perplexity
from optimum_ksparse.checkpoint.staging import write_text

# Some 94,000 tokens of text, 2,048 of them a step, measured every 16,384 on 24 windows.
SETTINGS = "--num-samples 184 --batch-size 4 --eval-every 8 --max-tokens 12288 --save-steps 16"
_KEPT = ("num_samples", "seq_len", "batch_size", "num_epochs", "learning_rate", "temperature", "cross_entropy", "bf16")


def curve(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens and perplexity of each measurement of a run."""
    a_step = record["tokens"] // record["steps"]
    return [{"tokens": a_step * row["step"], "perplexity": row["perplexity"]} for row in record["history"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("dense", "sparse", "text", "validation"):
        parser.add_argument(name)
    parser.add_argument("out", type=Path)
    args, more = parser.parse_known_args()
    words = [args.sparse, str(args.out), "--teacher", args.dense, "--dataset", args.text, "--texts", args.validation]
    command = [sys.executable, "-m", "optimum_ksparse", "finetune", "distill", *words, *SETTINGS.split(), *more]
    start = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - start
    record = json.loads((args.out / "finetuning.json").read_text(encoding="utf-8"))
    dense, tokenizer = AutoModelForCausalLM.from_pretrained(args.dense), AutoTokenizer.from_pretrained(args.dense)
    how = {"seq_len": record["seq_len"], "max_tokens": record["max_tokens"]}
    row = evaluate_perplexity(dense, tokenizer, args.validation, **how)
    rows = curve(record)
    result = {
        "dense": row["perplexity"],
        "curve": rows,
        "seconds": round(seconds, 1),
        "settings": {name: record[name] for name in _KEPT},
    }
    write_text(args.out / "curve.json", json.dumps(result, indent=1) + "\n")
    print(f"dense: {row['perplexity']:.2f}", *(f"{r['tokens']:9,}: {r['perplexity']:.2f}" for r in rows), sep="\n")


if __name__ == "__main__":
    main()
