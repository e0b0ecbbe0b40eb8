"""Whether one pass through each block (`true_sequential`) prunes as well as two: perplexity by method, over seeds.

python examples/benchmarks/one_pass.py MODEL CALIBRATION VALIDATION RESULTS.jsonl --methods wanda admm admm+block …

CALIBRATION and VALIDATION are files of texts (`.jsonl` or `.txt`), or `english` both: every second page of Python's
own documentation, and the others. Both ways prune the dense model at 2:4 with the same samples. What RESULTS holds
already is not measured again; a table closes, with mean ± sample standard deviation over the seeds.
"""

import argparse
import json
from pathlib import Path

import english
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from optimum_ksparse import SparsityConfig, evaluate_perplexity, sparsify
from optimum_ksparse.nn import densified
from optimum_ksparse.study import spread

PASSES = ("two", "one")
WINDOW, WINDOWS = 512, 4  # of the validation text


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "calibration", "validation"):
        parser.add_argument(name)
    parser.add_argument("results", type=Path)
    parser.add_argument("--methods", nargs="+", required=True, help="`+block`: followed by reconstruction of blocks")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    logging.set_verbosity_error()
    lines = args.results.read_text(encoding="utf-8").splitlines() if args.results.exists() else []
    rows = [json.loads(line) for line in lines]
    model = Path(args.model).name
    for method in args.methods:
        for seed in range(args.seeds):
            for passes in PASSES:
                size = {"samples": args.samples, "seq_len": args.seq_len}
                cell = {"model": model, "method": method, **size, "seed": seed, "passes": passes}
                if any(cell.items() <= row.items() for row in rows):
                    continue
                rows.append({**cell, "windows": WINDOWS, "perplexity": round(perplexity(args, cell), 4)})
                with args.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


def perplexity(args: argparse.Namespace, cell: dict) -> float:
    """That of the model pruned so, on the first windows of the validation text."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    method, _, reconstruct = cell["method"].partition("+")
    config = SparsityConfig(
        method,
        "2:4",
        dataset=english.CALIBRATION if args.calibration == "english" else args.calibration,
        num_samples=args.samples,
        seq_len=args.seq_len,
        batch_size=4,
        seed=cell["seed"],
        reconstruct=reconstruct or None,
        true_sequential=cell["passes"] == "one",
    )
    sparsify(model, config, tokenizer)
    texts = english.VALIDATION if args.validation == "english" else args.validation
    with densified(model):  # every pass on the CPU would decompress the packed weights anew
        found = evaluate_perplexity(model, tokenizer, texts, seq_len=WINDOW, max_tokens=WINDOWS * WINDOW, batch_size=1)
    return found["perplexity"]


def table(rows: list[dict]) -> str:
    found: dict[tuple, dict[str, list[float]]] = {}
    for row in rows:
        kind = row["model"], row["method"], f"{row['samples']} x {row['seq_len']}"
        found.setdefault(kind, {}).setdefault(row["passes"], []).append(row["perplexity"])
    lines = ["| model | method | calibration tokens | two passes | one |", "|---|---|---|---|---|"]
    for kind, values in found.items():
        figures = [spread(values[passes]).text(2) if passes in values else "" for passes in PASSES]
        lines.append(f"| {' | '.join([*kind, *figures])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
