"""Whether a term of low rank beside the sparse weights is worth its bytes: perplexity by rank, and by pattern.

python examples/benchmarks/low_rank.py MODEL CALIBRATION VALIDATION RESULTS.jsonl --cells 2:4 2:4+16 4:8 … --blocks

CALIBRATION and VALIDATION are `.jsonl` files of texts, or `english` both: every second page of Python's own
documentation, and the others. `2:4+16` is W ≈ S + L·R with S of the pattern and L·R of rank 16, found in turns: ADMM
for S of W − L·R, then the best L·R of W − S in the metric of the damped Gram matrix, three times. `2:4+16 merged` is
pure 2:4 again: the weights on the mask of S that come nearest to W. With `--blocks` reconstruction tunes L and R with
the rest. Each row has the bits of a weight in 16 bit, L and R included. What RESULTS holds already is not measured
again.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import cells
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from optimum_ksparse import SparsityConfig, evaluate_perplexity, sparsify
from optimum_ksparse.nn import SparseLinear, densified
from optimum_ksparse.pruners import METHODS
from optimum_ksparse.pruners.scaled import cholesky_factor, scale
from optimum_ksparse.pruners.solve import solve_on_mask
from optimum_ksparse.pruners.statistics import GramMatrix

TURNS, DAMPING, VALUE_BITS = 3, 0.1, 16
WINDOW, WINDOWS = 512, 24


def main() -> None:
    parser = cells.parser_of(__doc__)
    parser.add_argument("--cells", nargs="+", required=True)
    parser.add_argument("--blocks", action="store_true")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    logging.set_verbosity_error()
    reconstruct = "block" if args.blocks else None
    wanted = [
        {"cell": name, "samples": args.samples, "seed": seed, "reconstruct": reconstruct}
        for seed, name in itertools.product(args.seeds, args.cells)
    ]
    cells.fill(args, wanted, lambda cell: measure(args, cell["cell"], cell["seed"]))


def measure(args: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)  # of the singular vectors
    pattern, _, rank = name.partition("+")
    rank, _, merged = rank.partition(" ")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration, texts = cells.texts_of(args)
    data = {"dataset": calibration, "num_samples": args.samples, "seq_len": WINDOW, "seed": seed, "batch_size": 4}
    config = SparsityConfig("admm", pattern, **data, reconstruct="block" if args.blocks else None)
    started = time.perf_counter()
    with low_rank(int(rank or 0), bool(merged)):
        sparsify(model, config, tokenizer)
        seconds = time.perf_counter() - started
        with densified(model):  # packed weights are decompressed by every pass
            found = evaluate_perplexity(
                model, tokenizer, texts, seq_len=WINDOW, max_tokens=WINDOWS * WINDOW, batch_size=4
            )
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    values = sum(p.numel() for layer in layers for p in layer.parameters(recurse=False) if p is not layer.bias)
    bits = 1 + VALUE_BITS * values / sum(layer.shape.numel() for layer in layers)  # that of the mask, too
    return {"bits": round(bits, 3), "perplexity": round(found["perplexity"], 4), "seconds": round(seconds, 1)}


@contextmanager
def low_rank(rank: int, merged: bool) -> Iterator[None]:
    """Within it ADMM leaves a term of low rank beside each sparse layer, or merges it. Reconstruction tunes the term
    too, as parameters of one dimension, which biases are."""
    admm, from_packed, forward = METHODS["admm"], SparseLinear.from_packed, SparseLinear.forward
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def prune(weight, statistics, pattern, **settings):
        fitted = torch.zeros_like(weight)
        for _ in range(TURNS):
            sparse, mask = admm.prune(weight - fitted, statistics, pattern, **settings)
            left, right = factors(weight - sparse, statistics, rank)
            fitted = left @ right
        if merged:
            return solve_on_mask(weight, statistics.gram, mask, start=sparse), mask
        found.append((left, right))
        return sparse, mask

    def attach(layer, packed):
        sparse = from_packed(layer, packed)
        sparse.left, sparse.right = (nn.Parameter(factor.flatten()) for factor in found.pop())
        return sparse

    def added(module, x):
        left, right = module.left.view(module.out_features, rank), module.right.view(rank, module.in_features)
        return forward(module, x) + F.linear(F.linear(x, right), left)

    with ExitStack() as stack:
        if rank:
            stack.enter_context(patch.dict(METHODS, admm=replace(admm, prune=prune)))
        if rank and not merged:
            stack.enter_context(patch.object(SparseLinear, "from_packed", attach))
            stack.enter_context(patch.object(SparseLinear, "forward", added))
        yield


def factors(error: torch.Tensor, statistics: GramMatrix, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """L [out, rank] and R [rank, in] with the least ‖X(E − LR)ᵀ‖: with H = C·Cᵀ, by the singular vectors of E·C."""
    problem = scale(error, statistics, DAMPING)
    lower = cholesky_factor(problem.gram)
    u, s, v = torch.svd_lowrank(problem.weight @ lower, q=min(rank + 16, *error.shape), niter=3)
    right = torch.linalg.solve_triangular(lower, v[:, :rank].T, upper=False, left=False) / problem.scale
    size = s[:rank].sqrt()
    return u[:, :rank] * size, right * size[:, None]


if __name__ == "__main__":
    main()
