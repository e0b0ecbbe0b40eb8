"""One measured run of `prune_speed.py`, in a process of its own: load, prune, add one line of JSON to a file.

python examples/benchmarks/prune_speed_worker.py TOOL SPECIFICATION.json RESULT.jsonl

Runs in the environment of its TOOL, "optimum-ksparse" or "llm-compressor", and imports nothing of the other one.
The specification: `model` (folder), `tokens` (a .safetensors or .pt file with `calibration`, [samples, seq_len]),
`method`, `pattern`, `dtype`, `batch_size`, `threads`, `output` (folder for the pruned model as a dense checkpoint,
written after the clock has stopped; or null).
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

STARTED = time.perf_counter()


def peak_memory() -> int:
    """Peak resident bytes of this process. Not `ru_maxrss`, which a process inherits over exec."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def read_tokens(path: str) -> torch.Tensor:
    """The calibration tokens, [samples, seq_len] int64."""
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)["calibration"]
    found = torch.load(path, weights_only=True)
    return found["calibration"] if isinstance(found, dict) else found


def optimum_ksparse(ids: torch.Tensor, run: dict[str, Any], **more: Any) -> Callable[[Any], None]:
    """Prunes as `from_pretrained(..., sparsity_config=...)` does."""
    from optimum_ksparse import SparsityConfig, sparsify

    settings = {"storage": "dense", "batch_size": run["batch_size"], **more}
    config = SparsityConfig.from_flat(run["method"], run["pattern"], dataset=ids, **settings)
    return lambda model: sparsify(model, config)


def optimum_ksparse_bfloat16(ids: torch.Tensor, run: dict[str, Any]) -> Callable[[Any], None]:
    """With the matrix products of the calibration passes in bfloat16; weights and statistics stay as they are."""
    return optimum_ksparse(ids, run, calibration_dtype="bfloat16")


def optimum_ksparse_one_pass(ids: torch.Tensor, run: dict[str, Any]) -> Callable[[Any], None]:
    """Each layer with the inputs that the pruned layers before it give: one pass through a block instead of two."""
    return optimum_ksparse(ids, run, true_sequential=True)


def llm_compressor(ids: torch.Tensor, run: dict[str, Any]) -> Callable[[Any], None]:
    """Prunes by `oneshot`. The tokens go in as a DataLoader, which it takes as it is: nothing is shuffled or cut. The
    tokenizer is loaded before the clock starts, because `oneshot` would load the one of the folder."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from torch.utils.data import DataLoader

    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[run["method"]]
    n, _, m = run["pattern"].partition(":")
    # Its n of n:m are ZEROS, and 0:0 is unstructured.
    share, mask = (1 - int(n) / int(m), f"{int(m) - int(n)}:{m}") if m else (float(n.rstrip("%")) / 100, "0:0")
    recipe = modifier(sparsity=share, mask_structure=mask, targets=["Linear"], ignore=["re:.*lm_head"])
    samples = [{"input_ids": sample, "attention_mask": torch.ones_like(sample)} for sample in ids]
    data = DataLoader(samples, batch_size=run["batch_size"])
    how = {"pipeline": "sequential", "processor": AutoTokenizer.from_pretrained(run["model"])}
    return lambda model: oneshot(model=model, recipe=recipe, dataset=data, **how)


TOOLS = {
    "optimum-ksparse": (optimum_ksparse, ("optimum-ksparse", "torch", "transformers")),
    "optimum-ksparse bfloat16": (optimum_ksparse_bfloat16, ("optimum-ksparse", "torch", "transformers")),
    "optimum-ksparse one pass": (optimum_ksparse_one_pass, ("optimum-ksparse", "torch", "transformers")),
    "llm-compressor": (llm_compressor, ("llmcompressor", "compressed-tensors", "torch", "transformers")),
}


def main(tool: str, specification: str, result: str) -> None:
    run = json.loads(Path(specification).read_text(encoding="utf-8"))
    torch.set_num_threads(run["threads"])
    prepare, packages = TOOLS[tool]
    prune = prepare(read_tokens(run["tokens"]), run)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(run["model"], dtype=run["dtype"]).eval()
    loaded, loaded_bytes, used = time.perf_counter(), peak_memory(), time.process_time()
    prune(model)
    stopped, peak_bytes, used = time.perf_counter(), peak_memory(), time.process_time() - used
    if run["output"]:
        model.save_pretrained(run["output"], **({"save_compressed": False} if tool == "llm-compressor" else {}))
    row = {
        "tool": tool,
        "method": run["method"],
        "pattern": run["pattern"],
        "import_seconds": round(started - STARTED, 3),
        "load_seconds": round(loaded - started, 3),
        "prune_seconds": round(stopped - loaded, 3),
        "prune_cpu_seconds": round(used, 3),
        "total_seconds": round(stopped - started, 3),
        "loaded_peak_bytes": loaded_bytes,
        "peak_bytes": peak_bytes,
        "versions": {name: version(name) for name in packages},
    }
    with open(result, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + os.linesep)


if __name__ == "__main__":
    main(*sys.argv[1:])
