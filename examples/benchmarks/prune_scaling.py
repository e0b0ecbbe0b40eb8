"""How the time of pruning grows with width, depth and samples: measured on small models, counted for large ones.

`python examples/benchmarks/prune_speed.py --scaling` runs this. Exponents are slopes of straight lines through the
measured points on log-log paper. Times of large models are EXTRAPOLATED ON PAPER, from counted floating point
operations and the throughputs of `ASSUMED`: nothing of that size was run.

The models are GPT-NeoX with random weights, hidden size d, inner size 4d and blocks of four linear maps, 12d² weights:
q, k and v [3d, d], o [d, d], up [4d, d], down [d, 4d]. n is the number of calibration tokens, all samples together.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GPTNeoXConfig, logging

from optimum_ksparse import SparsityConfig, sparsify
from optimum_ksparse.pruners.statistics import SAMPLE_ROWS
from optimum_ksparse.study.benchmark.models import random_model

METHODS = ("wanda", "sparsegpt")
BASE = {"width": 512, "depth": 4, "samples": 8}
AXES = {"width": (256, 512, 768, 1024), "depth": (2, 4, 8), "samples": (4, 8, 16, 32)}
SEQ_LEN, WORDS = 256, 1024
BLOCK_SIZE = 128  # columns that SparseGPT sweeps at a time
LARGE = {
    "Polyglot-Ko 12.8B": {"width": 5120, "depth": 40, "samples": 128, "seq_len": 2048},
    "175B": {"width": 12288, "depth": 96, "samples": 128, "seq_len": 2048},
}
# Of one H200: peaks are NVIDIA's, shares and launches are guesses.
ASSUMED = {
    "bf16_flops": 989e12 * 0.40,  # dense tensor cores: forward passes and, summed in float32, Gram products
    "float32_flops": 67e12 * 0.50,  # updates and output errors, in float32 without TF32
    "factor_flops": 67e12 * 0.10,  # Cholesky factors and their inverses, which wait for their panels
    "bytes": 4.8e12 * 0.60,  # sums over inputs, sweeps within a block of columns, masks
    "sweep_seconds": 50e-6,  # one kernel, which sweeps a block of columns
    "mask_passes": 30,  # over a layer's weights in float32: scores, ranks, packing
    "bus_bytes": 50e9,  # for a model that the card cannot hold: each block comes in twice and goes out once
    "card_bytes": 141e9,
}


def operations(method: str, width: int, depth: int, samples: int, seq_len: int) -> dict[str, float]:
    """What pruning a model takes, all blocks together, by part.

    | part | unit | one block |
    |---|---|---|
    | forward | FLOP | 2n·8d² up to the last linear map, to collect, and 2n·12d² to hand on (not after the last block), each with an attention of 4n·seq_len·d; one sample through the dense model before |
    | errors | FLOP | of 256 tokens, two products with each layer: 4·256·12d² |
    | gram | FLOP | SparseGPT: 2n·k² for each input of k features: d, d, d, 4d (on a CPU 5/8 of it from k = 1024 on) |
    | factor | FLOP | SparseGPT: 2/3·k³ for each: Cholesky and the inverse of its factor |
    | sweep | FLOP | SparseGPT: out·in² for each layer, to update the columns right of a block |
    | traffic | bytes | Wanda: 12 for each input value; SparseGPT: 4·128 for each weight, swept within a block |
    | sweeps | number | SparseGPT: blocks of columns swept |
    | weights | number | 12d² |
    """  # noqa: E501
    tokens, inputs = samples * seq_len, (width, width, width, 4 * width)
    layers = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    weights = 12 * width**2
    attention = 4 * tokens * seq_len * width
    hand_on = 2 * tokens * weights + attention
    collect = hand_on - 2 * tokens * 4 * width**2
    found = {
        "forward": depth * collect + (depth - 1) * hand_on + depth * hand_on / samples,
        "errors": depth * 4 * min(tokens, SAMPLE_ROWS) * weights,
        "weights": depth * weights,
    }
    if method == "wanda":
        return found | {"traffic": depth * 12 * tokens * sum(inputs)}
    return found | {
        "gram": depth * sum(2 * tokens * k**2 for k in inputs),
        "factor": depth * sum(2 / 3 * k**3 for k in inputs),
        "sweep": depth * sum(rows * columns**2 for rows, columns in layers),
        "traffic": depth * 4 * BLOCK_SIZE * weights,
        "sweeps": depth * sum(columns / BLOCK_SIZE for _, columns in layers),
    }


def on_paper(counted: dict[str, float]) -> dict[str, float]:
    """Seconds of each part on one H200, as `ASSUMED`; an extrapolation, not a measurement."""
    part = {name: counted.get(name, 0.0) for name in ("gram", "factor", "sweep", "traffic", "sweeps")}
    masks = ASSUMED["mask_passes"] * 4 * counted["weights"] / ASSUMED["bytes"]
    dense_bytes = 2 * counted["weights"]
    seconds = {
        "forward passes": counted["forward"] / ASSUMED["bf16_flops"],
        "statistics": part["gram"] / ASSUMED["bf16_flops"] + counted["errors"] / ASSUMED["float32_flops"],
        "factors": part["factor"] / ASSUMED["factor_flops"],
        "sweeps": part["sweep"] / ASSUMED["float32_flops"] + part["sweeps"] * ASSUMED["sweep_seconds"],
        "masks": masks,
        "bus": 3 * dense_bytes / ASSUMED["bus_bytes"] if dense_bytes > ASSUMED["card_bytes"] else 0.0,
    }
    seconds["sweeps" if part["sweeps"] else "statistics"] += part["traffic"] / ASSUMED["bytes"]
    return seconds


def fit_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope b of log(seconds) = a + b·log(size), by least squares."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (sizes, seconds))
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))


def measure(method: str, width: int, depth: int, samples: int, repeats: int, seq_len: int = SEQ_LEN) -> float:
    """Median seconds of pruning a random model in float32 to 2:4."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth}
    words = {"vocab_size": WORDS, "max_position_embeddings": seq_len}
    model_config = GPTNeoXConfig(**sizes, **words, num_attention_heads=max(1, width // 64))
    ids = torch.randint(WORDS, (samples, seq_len), generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(repeats):
        model = random_model(model_config, torch.float32, torch.device("cpu"))
        started = time.perf_counter()
        sparsify(model, SparsityConfig(method, "2:4", dataset=ids))
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def scaling(repeats: int, axes: dict[str, Sequence[int]] = AXES, base: dict[str, int] = BASE) -> dict[str, Any]:
    """Measures along each axis from `base`, fits, and extrapolates."""
    logging.set_verbosity_error()
    measured: dict[tuple[Any, ...], float] = {}
    cells, exponents = [], []
    for method in METHODS:
        measure(method, 64, 1, 2, 1)  # what the first call sets up is not counted
        for axis, values in axes.items():
            for value in values:
                sizes = {**base, axis: value}
                key = (method, *sizes.values())
                if key not in measured:
                    measured[key] = measure(method, **sizes, repeats=repeats)
                    print(f"{method} {sizes}: {measured[key]:.2f} s", flush=True)
                cells.append({"method": method, "axis": axis, **sizes, "seconds": round(measured[key], 4)})
            seconds = [cell["seconds"] for cell in cells[-len(values) :]]
            exponents.append({"method": method, "axis": axis, "exponent": round(fit_exponent(values, seconds), 3)})
    paper = [
        {"model": name, "method": method, "counted": counted, "seconds": on_paper(counted)}
        for name, sizes in LARGE.items()
        for method in METHODS
        for counted in [operations(method, **sizes)]
    ]
    setting = {"pattern": "2:4", "dtype": "float32", "seq_len": SEQ_LEN, "base": base, "repeats": repeats}
    return {"setting": setting, "cells": cells, "exponents": exponents, "assumed": ASSUMED, "on_paper": paper}


def scaling_tables(found: dict[str, Any]) -> str:
    """Markdown: what was measured, the exponents, and the extrapolation, named as such."""
    lines = ["| method | along | width | depth | samples | seconds | counted GFLOP | GFLOP/s |", "|---" * 8 + "|"]
    for cell in found["cells"]:
        sizes = {name: cell[name] for name in BASE}
        counted = operations(cell["method"], **sizes, seq_len=found["setting"]["seq_len"])
        flop = sum(counted.get(part, 0) for part in ("forward", "errors", "gram", "factor", "sweep")) / 1e9
        numbers = f"{cell['seconds']:.2f} | {flop:.0f} | {flop / cell['seconds']:.0f}"
        lines.append(f"| {cell['method']} | {cell['axis']} | {' | '.join(map(str, sizes.values()))} | {numbers} |")
    lines += ["", "Seconds grow as size to the power of:", ""]
    lines += ["| method | width | depth | samples |", "|---" * 4 + "|"]
    for method in METHODS:
        powers = {row["axis"]: row["exponent"] for row in found["exponents"] if row["method"] == method}
        lines.append(f"| {method} | " + " | ".join(f"{powers[axis]:.2f}" for axis in BASE) + " |")
    lines += [
        "",
        "**Extrapolated on paper, not measured**: seconds on one H200, 128 × 2048 tokens, bfloat16, from counted",
    ]
    lines += ["operations and the throughputs that `ASSUMED` in `prune_scaling.py` states.", ""]
    parts = list(found["on_paper"][0]["seconds"])
    lines += [f"| model | method | PFLOP | {' | '.join(parts)} | total |", "|---" * (len(parts) + 4) + "|"]
    for row in found["on_paper"]:
        flop = sum(row["counted"].get(part, 0) for part in ("forward", "errors", "gram", "factor", "sweep")) / 1e15
        seconds = [*row["seconds"].values(), sum(row["seconds"].values())]
        numbers = " | ".join(f"{value:.1f}" if value else "–" for value in seconds)
        lines.append(f"| {row['model']} | {row['method']} | {flop:.1f} | {numbers} |")
    return "\n".join(lines)
