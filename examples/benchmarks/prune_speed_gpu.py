"""How long pruning a big model takes, from the loaded to the packed model, and where the time goes.

python examples/benchmarks/prune_speed_gpu.py [--model polyglot-ko-5.8b] [--methods wanda sparsegpt] [--output FILE]

The model has the shape of that name and random weights in bfloat16, which take as long as real ones; calibration is
128 x 2048 random tokens. Prints, and writes as JSON: seconds, peak memory, seconds in the pruning of layers, and the
operators that took most of the time in two blocks, profiled apart.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from optimum_ksparse import SparsityConfig, sparsify
from optimum_ksparse.study.benchmark import BenchResults
from optimum_ksparse.study.benchmark.models import model_config, random_model


def prune(config: Any, method: str, args: argparse.Namespace) -> Any:
    """Prunes a model of that config; its report."""
    model = random_model(config, torch.bfloat16, torch.device(args.device))
    shape = (args.samples, args.seq_len)
    ids = torch.randint(3, config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return sparsify(model, SparsityConfig(method, args.pattern, dataset=ids))


def operators(config: Any, method: str, args: argparse.Namespace, number: int = 12) -> list[dict[str, Any]]:
    """The operators with most time of their own, in two blocks of the model."""
    config.num_hidden_layers = min(2, config.num_hidden_layers)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if args.device == "cuda" else [])]
    with profile(activities=activities) as found:
        prune(config, method, args)
    own = f"self_{'device' if args.device == 'cuda' else 'cpu'}_time_total"
    rows = sorted(found.key_averages(), key=lambda row: -getattr(row, own))[:number]
    return [{"name": row.key[:80], "calls": row.count, "seconds": round(getattr(row, own) / 1e6, 3)} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="polyglot-ko-5.8b", help="a shape of `optimum-cli ksparse bench`")
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--layers", type=int, help="fewer blocks, to try the script")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    hardware = BenchResults.here(torch.device(args.device)).hardware
    setting = {"model": args.model, "pattern": args.pattern, "samples": args.samples, "seq_len": args.seq_len}
    results: dict[str, Any] = {"hardware": hardware, "setting": setting, "runs": []}
    for method in args.methods:
        config = model_config(args.model)
        config.num_hidden_layers = args.layers or config.num_hidden_layers
        report = prune(config, method, args)
        row = {
            "method": method,
            "blocks": config.num_hidden_layers,
            "seconds": report.seconds,
            "seconds_in_layers": round(sum(layer.seconds for layer in report.layers), 2),
            "peak_memory_bytes": report.peak_memory_bytes,
            "operators_of_two_blocks": operators(config, method, args),
        }
        results["runs"].append(row)
        print(json.dumps(row, indent=1), flush=True)
        if args.output:
            args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
