"""Pruning beside llm-compressor 0.14: same model, same token ids, same method and pattern, one run after the other.

python examples/benchmarks/prune_speed.py                                   # Gemma 3 270M, the demo's texts, 2:4
python examples/benchmarks/prune_speed.py --methods sparsegpt --patterns 2:4 50% --repeats 5
python examples/benchmarks/prune_speed.py --model FOLDER --calibration TEXTS.jsonl --evaluation TEXTS.jsonl
python examples/benchmarks/prune_speed.py --scaling                         # width, depth, samples: `prune_scaling.py`

Each measured run is a fresh process (`prune_speed_worker.py`) that loads the model, prunes it and tells seconds and
peak memory; the tools take turns. The first result of each is saved as a dense checkpoint, checked layer by layer
against the pattern, and its perplexity is measured here. llm-compressor lives in an environment of its own, which
the first call builds in the cache folder with the torch of constraints.txt. Wants a quiet machine.
"""

import argparse
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import prune_scaling
import torch
from prune_speed_setup import CACHE, build_environment, calibration_tokens, embedded_model
from prune_speed_worker import TOOLS, read_tokens
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from optimum_ksparse import Pattern, evaluate_perplexity
from optimum_ksparse.blocks import find_blocks
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.checkpoint.staging import write_text
from optimum_ksparse.nn import dense_weight, is_linear_map
from optimum_ksparse.study.benchmark import BenchResults

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
THEIRS = "llm-compressor"


def run_once(tool: str, python: Path | str, run: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One measured process; its row. Raises RuntimeError with the end of its log where it fails."""
    specification, result, log = folder / "run.json", folder / "result.jsonl", folder / "log.txt"
    specification.write_text(json.dumps(run), encoding="utf-8")
    result.unlink(missing_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"OMP_NUM_THREADS": str(run["threads"]), "PYTHONPATH": "" if tool == THEIRS else str(REPOSITORY)}
    command = [python, HERE / "prune_speed_worker.py", tool, specification, result]
    load = os.getloadavg()[0]
    with open(log, "w", encoding="utf-8") as stream:
        code = subprocess.run(command, env=environment, stdout=stream, stderr=stream).returncode
    if code:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
        raise RuntimeError("\n".join([f"{tool} failed with status {code}:", *tail]))
    return json.loads(result.read_text(encoding="utf-8")) | {"load_average_before": round(load, 2)}


def check(model: Any, pattern: str) -> dict[str, Any]:
    """Number and density of the linear maps in the decoder blocks. Raises ValueError for one that breaks the
    pattern."""
    found = [(name, m) for block in find_blocks(model).blocks for name, m in block.named_modules() if is_linear_map(m)]
    for name, linear in found:
        Pattern(pattern).verify(dense_weight(linear), name)
    weights = [dense_weight(linear) for _, linear in found]
    density = sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)
    return {"layers": len(found), "density": round(density, 6)}


def evaluate(folder: Path, tokenizer: Any, pattern: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of a checkpoint, in dense modules whoever wrote it; with a pattern, also what `check` finds."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype)
    if sparse_modules(model):
        model.dequantize()
    found = check(model, pattern) if pattern else {}
    how = {"seq_len": args.seq_len, "max_tokens": args.windows * args.seq_len}
    measured = evaluate_perplexity(model, tokenizer, args.evaluation, **how)
    return found | {name: measured[name] for name in ("perplexity", "num_tokens", "texts")}


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each tool, method and pattern; medians over the repeats, the highest peak."""
    setting = results["setting"]
    lines = [
        "| tool | method | pattern | pruning, s | total, s | peak memory, GB | perplexity | speed |",
        "|---" * 8 + "|",
    ]
    rows: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in results["runs"]:
        rows.setdefault((row["method"], row["pattern"], row["tool"]), []).append(row)
    medians = {key: statistics.median(row["prune_seconds"] for row in some) for key, some in rows.items()}
    for (method, pattern, tool), some in rows.items():
        total = statistics.median(row["total_seconds"] for row in some)
        peak = max(row["peak_bytes"] for row in some) / 1e9
        perplexity = next((f"{row['perplexity']:.2f}" for row in some if "perplexity" in row), "–")
        pruning, theirs = medians[method, pattern, tool], medians.get((method, pattern, THEIRS))
        ratio = f"{theirs / pruning:.2f}" if theirs else "–"
        numbers = f"{pruning:.1f} | {total:.1f} | {peak:.2f} | {perplexity} | {ratio}"
        lines.append(f"| {tool} | {method} | {pattern} | {numbers} |")
    hardware = "{device}, {threads} threads".format(**results["hardware"])
    versions = "; ".join(
        f"{tool}: " + ", ".join(f"{name} {number}" for name, number in found.items())
        for tool, found in results["versions"].items()
    )
    note = (
        f"{hardware}. {setting['model']} in {setting['dtype']}, {setting['samples']} × {setting['seq_len']} tokens, "
        f"batches of {setting['batch_size']}, dense perplexity {results['dense']['perplexity']:.2f}. Medians of "
        f"{min(map(len, rows.values()), default=0)} runs; total counts loading; speed 1.00 is {THEIRS}. {versions}."
    )
    return "\n".join([*lines, "", note])


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Runs everything; the results are written after each run, so that Ctrl-C loses one at most."""
    args.cache.mkdir(parents=True, exist_ok=True)
    pythons: dict[str, Any] = dict.fromkeys(TOOLS, sys.executable)
    if THEIRS in args.tools:
        pythons[THEIRS] = build_environment(args.cache)
    model = args.model or embedded_model(args.cache, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(model)
    results = {"hardware": BenchResults.here(torch.device("cpu")).hardware | {"threads": args.threads}}
    with tempfile.TemporaryDirectory(prefix="run-", dir=args.cache) as name:
        folder = Path(name)
        if args.tokens is None:
            ids = calibration_tokens(model, args.calibration, args.samples, args.seq_len)
            save_file({"calibration": ids}, folder / "tokens.safetensors")
        else:
            ids = read_tokens(str(args.tokens))
            args.seq_len = ids.shape[1]
        print(f"Measuring the dense model on {args.windows} windows of {args.seq_len} tokens", flush=True)
        results |= {
            "versions": {},
            "setting": {
                "model": model.name,
                "dtype": args.dtype,
                "samples": len(ids),
                "seq_len": args.seq_len,
                "tokens_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
                "batch_size": args.batch_size,
            },
            "dense": evaluate(model, tokenizer, None, args),
            "runs": [],
        }
        run = {"model": str(model.resolve()), "tokens": str((args.tokens or folder / "tokens.safetensors").resolve())}
        run |= {name: getattr(args, name) for name in ("dtype", "batch_size", "threads")}
        plan = list(itertools.product(args.methods, args.patterns, range(args.repeats), args.tools))
        for number, (method, pattern, repeat, tool) in enumerate(plan, 1):
            print(f"[{number}/{len(plan)}] {tool} {method} {pattern}: ", end="", flush=True)
            output = folder / "pruned"
            run |= {"method": method, "pattern": pattern, "output": None if repeat else str(output)}
            row = run_once(tool, pythons[tool], run, folder)
            results["versions"][tool] = row.pop("versions")
            print(f"{row['prune_seconds']:.1f} s, {row['peak_bytes'] / 1e9:.2f} GB", flush=True)
            if not repeat:
                row |= evaluate(output, tokenizer, pattern, args)
            results["runs"].append(row)
            write_text(args.output, json.dumps(results, indent=1) + "\n")
    return results


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, help="folder with model and tokenizer (default: the demo's Gemma 3 270M)")
    add("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    add("--methods", nargs="+", choices=("wanda", "sparsegpt"), default=["wanda", "sparsegpt"])
    add("--patterns", nargs="+", default=["2:4"], help="n:m, or the share of zeros, such as 50%%")
    add("--repeats", type=int, default=3)
    add("--samples", type=int, default=8)
    add("--seq-len", type=int, default=512)
    add("--windows", type=int, default=8, help="of seq-len tokens, on which perplexity is measured")
    add("--calibration", default=str(HERE.parent / "data/korean_calibration.txt"), help=".txt or .jsonl")
    add("--evaluation", default=str(HERE.parent / "data/korean_evaluation.txt"), help=".txt or .jsonl")
    add("--tokens", type=Path, help="calibration token ids instead, .safetensors or .pt")
    add("--batch-size", type=int, default=4, help="samples in a forward pass, of both tools")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--cache", type=Path, default=CACHE)
    add("--scaling", action="store_true", help="instead: how the time grows with width, depth and samples")
    add("--output", type=Path, help="file for the results as JSON (default: in results/prune_speed)")
    args = parser.parse_args(given)
    kind = "scaling" if args.scaling else "cpu"
    args.output = args.output or HERE / f"results/prune_speed/{kind}-{args.threads}-threads.json"
    return args


def main(args: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if not args.scaling:
        print(table(compare(args)))
        return
    found = prune_scaling.scaling(args.repeats)
    hardware = BenchResults.here(torch.device("cpu")).hardware
    write_text(args.output, json.dumps({"hardware": hardware, **found}, indent=1) + "\n")
    print(prune_scaling.scaling_tables(found))


if __name__ == "__main__":
    try:
        main(arguments())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
