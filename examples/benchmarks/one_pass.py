"""Whether one pass through each block (`true_sequential`) prunes as well as two: perplexity by method, over seeds.

python examples/benchmarks/one_pass.py MODEL CALIBRATION VALIDATION RESULTS.jsonl --methods wanda admm admm+block …

CALIBRATION and VALIDATION are files of texts (`.jsonl` or `.txt`), or `english` both: every second page of Python's
own documentation, and the others. Both ways prune the dense model at 2:4 with the same samples. What RESULTS holds
already is not measured again; a table closes, with mean ± sample standard deviation over the seeds.
"""

import argparse
import itertools

import cells
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from optimum_ksparse import SparsityConfig, evaluate_perplexity, sparsify
from optimum_ksparse.nn import densified
from optimum_ksparse.study import spread

PASSES = ("two", "one")
WINDOW, WINDOWS = 512, 4  # of the validation text


def main() -> None:
    parser = cells.parser_of(__doc__)
    parser.add_argument("--methods", nargs="+", required=True, help="`+block`: followed by reconstruction of blocks")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    logging.set_verbosity_error()
    size = {"samples": args.samples, "seq_len": args.seq_len}
    wanted = [
        {"method": method, **size, "seed": seed, "passes": passes}
        for method, seed, passes in itertools.product(args.methods, range(args.seeds), PASSES)
    ]
    measure = lambda cell: {"windows": WINDOWS, "perplexity": round(perplexity(args, cell), 4)}  # noqa: E731
    rows = cells.fill(args, wanted, measure)
    print(table(rows))


def perplexity(args: argparse.Namespace, cell: dict) -> float:
    """That of the model pruned so, on the first windows of the validation text."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration, texts = cells.texts_of(args)
    method, _, reconstruct = cell["method"].partition("+")
    config = SparsityConfig(
        method,
        "2:4",
        dataset=calibration,
        num_samples=args.samples,
        seq_len=args.seq_len,
        batch_size=4,
        seed=cell["seed"],
        reconstruct=reconstruct or None,
        true_sequential=cell["passes"] == "one",
    )
    sparsify(model, config, tokenizer)
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
