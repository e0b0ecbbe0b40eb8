"""Perplexity of pruned models beside the published code's, as JSON lines.

python examples/benchmarks/reference_perplexity.py MODEL CALIBRATION.jsonl EVALUATION.jsonl [RUN…]

A run is METHOD:PATTERN[:SETTING=VALUE]…, as `wanda:2of4`, `sparsegpt:50%` or `wanda:2of4:bos_in_statistics=false`;
the dense model is always measured first. Calibration: the first 32 samples of 512 tokens; measurement: the first 24
windows of 512 (each with the beginning token, where the tokenizer adds one), of texts joined by two newlines and
tokenised as one string.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from optimum_ksparse import SparsityConfig, evaluate_perplexity
from optimum_ksparse.data import prepends_bos

SAMPLES, WINDOWS, LENGTH = 32, 24, 512


def read(path: str) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def main(source: str, calibration: str, evaluation: str, *runs: str) -> None:
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(source)
    prefix = [tokenizer.bos_token_id] if prepends_bos(tokenizer, None) else []
    step = LENGTH - len(prefix)
    ids = tokenizer("\n\n".join(read(calibration)), add_special_tokens=False)["input_ids"]
    samples = torch.tensor([prefix + ids[i * step : (i + 1) * step] for i in range(SAMPLES)])
    for run in ("dense", *runs):
        if run == "dense":
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        else:
            method, pattern, *settings = run.split(":")
            values = {name: json.loads(value) for name, value in (setting.split("=") for setting in settings)}
            config = SparsityConfig(method, pattern.replace("of", ":"), dataset=samples, **values)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, sparsity_config=config)
        result = evaluate_perplexity(model, tokenizer, read(evaluation), seq_len=LENGTH, max_tokens=WINDOWS * LENGTH)
        seconds = None if run == "dense" else model.sparsity_report.seconds
        print(json.dumps({"run": run, "prune_seconds": seconds, **result}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
