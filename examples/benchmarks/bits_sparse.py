"""Perplexity of sparse models in float32, and with their kept values in 8 and 4 bits, from one pruning for all.

python examples/benchmarks/bits_sparse.py MODEL CALIBRATION VALIDATION RESULTS.json [--patterns 50% 2:4] [--seeds 3]
    [--blocks]

CALIBRATION and VALIDATION are files of texts, or `english` both, as in `one_pass.py`. ADMM prunes the model in
float32 with 32 x 512 tokens, and values are rounded to each type beside, as `SparsityConfig(values=…)` does,
with the statistics of the model whose values are not rounded; so seeds and types share masks and the ratio between
them is what rounding costs. With `--blocks` blocks are reconstructed with the rounding in their loss, so each type is
pruned anew. `bits_table.py` puts the figures beside those of `bits.py`. What RESULTS holds already is
not measured again.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager

import cells
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from optimum_ksparse import SparseLinear, SparsityConfig, evaluate_perplexity, sparsify
from optimum_ksparse.kernels import PackedWeight
from optimum_ksparse.nn import densified
from optimum_ksparse.pruning import layer as pruning

SAMPLES, LENGTH, WINDOWS = 32, 512, 24
TYPES = ("int8", "int4")
Rounded = dict[str, dict[str, PackedWeight]]  # type of values → name of the layer → its weight


@contextmanager
def rounded_beside(found: Rounded) -> Iterator[None]:
    """Within it, what is pruned is rounded to all types too, and put into `found`."""
    pack = pruning._pack

    def pack_all(name, weight, pruned, mask, statistics, config):
        for values in TYPES:
            quantised = dataclasses.replace(config, values=values)
            found.setdefault(values, {})[name] = pack(name, weight, pruned, mask, statistics, quantised)[0]
        return pack(name, weight, pruned, mask, statistics, config)

    pruning._pack = pack_all
    try:
        yield
    finally:
        pruning._pack = pack


def main() -> None:
    parser = cells.parser_of(__doc__)
    parser.add_argument("--patterns", nargs="+", default=["50%", "2:4"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--blocks", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    rows = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else []
    method = "admm + block" if args.blocks else "admm"
    done = {(row["pattern"], row["seed"], row["values"]) for row in rows if row["method"] in (None, method)}
    types = (None, *TYPES) if args.blocks else (None,)
    wanted = [("dense", None, None), *itertools.product(args.patterns, range(args.seeds), types)]
    for pattern, seed, values in wanted:
        if (pattern, seed, values) not in done:
            if seed is None:
                found = dense(args)
            elif args.blocks:
                found = with_blocks(args, pattern, seed, values)
            else:
                found = measured(args, pattern, seed)
            rows += found
            args.results.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            print(*(f"{row['values']} {row['perplexity']:.2f}" for row in found), pattern, seed, flush=True)


def load(args: argparse.Namespace):
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(args.model)


def perplexity(args: argparse.Namespace, model, tokenizer) -> dict:
    return evaluate_perplexity(model, tokenizer, cells.texts_of(args)[1], seq_len=LENGTH, max_tokens=WINDOWS * LENGTH)


def dense(args: argparse.Namespace) -> list[dict]:
    cell = {"method": None, "pattern": "dense", "seed": None, "values": None, "bits_per_weight": 16.0}
    return [{**cell, **perplexity(args, *load(args))}]


def measured(args: argparse.Namespace, pattern: str, seed: int) -> list[dict]:
    """A row for the floats, and one for each type of integers."""
    model, tokenizer = load(args)
    found: Rounded = {}
    with rounded_beside(found):
        sparsify(model, config_of(args, pattern, seed), tokenizer)
    rows = []
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "to_dense_weight")}
    with torch.no_grad():
        for values in (None, *TYPES):
            weights = {path: weight.dense() for path, weight in found.get(values, {}).items()}
            for name, module in layers.items():
                [path] = [path for path in found["int8"] if f".{name}".endswith(f".{path}")]
                module._dense_weight = module.to_dense_weight() if values is None else weights[path]
            row = {"method": "admm", "pattern": pattern, "seed": seed, "values": values}
            row["bits_per_weight"] = bits_a_weight(list(found[values or "int8"].values()), values)
            rows.append({**row, **perplexity(args, model, tokenizer)})
    return rows


def with_blocks(args: argparse.Namespace, pattern: str, seed: int, values: str | None) -> list[dict]:
    """A row for one type of values, or for the floats."""
    model, tokenizer = load(args)
    sparsify(model, config_of(args, pattern, seed, reconstruct="block", values=values), tokenizer)
    layers = [module.packed() for module in model.modules() if isinstance(module, SparseLinear)]
    row = {"method": "admm + block", "pattern": pattern, "seed": seed, "values": values}
    row["bits_per_weight"] = bits_a_weight(layers, values)
    with densified(model):
        return [{**row, **perplexity(args, model, tokenizer)}]


def config_of(args: argparse.Namespace, pattern: str, seed: int, **settings) -> SparsityConfig:
    sizes = {"num_samples": SAMPLES, "seq_len": LENGTH, "batch_size": 4}
    return SparsityConfig("admm", pattern, dataset=cells.texts_of(args)[0], seed=seed, **sizes, **settings)


def bits_a_weight(weights: list[PackedWeight], values: str | None) -> float:
    """Kept values, in 16 bit those that are floats, mask, and scales in 16 bit."""
    kept = sum(8 * w.values.nbytes if values else 16 * w.num_values for w in weights)
    scales = sum(16 * w.scale.numel() for w in weights) if values else 0
    total = kept + scales + sum(8 * w.bits.nbytes for w in weights)
    return total / sum(w.out_features * w.in_features for w in weights)


if __name__ == "__main__":
    main()
