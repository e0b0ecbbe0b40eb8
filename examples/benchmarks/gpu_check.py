"""Everything that a GPU should show, in one call: tests, benchmark, whole models, figures, all in one flat folder.

python examples/benchmarks/gpu_check.py FOLDER [--minutes 9] [--quick]

Each step is a process with a time limit of its own, so that one that hangs does not lose the others; at its limit it
is first interrupted, to write what it has. `summary.json` tells how each ended, `<step>.log` what it said. Needs
torch, transformers, triton, pytest, hypothesis and matplotlib. `--quick` takes small shapes and few tokens, to try
the script itself, also without a GPU.
"""

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
GRACE = 10  # seconds from the interrupt to the end, at most a quarter of a step's time
BENCH = [sys.executable, "-m", "optimum_ksparse", "bench", "--output", "{own}"]
TEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
AUTOTUNE = """
import torch
from optimum_ksparse import SparsityConfig, sparsify
from optimum_ksparse.study.benchmark.models import random_model
from optimum_ksparse.study.benchmark.models import model_config
from optimum_ksparse.runtime import autotune_kernels
config = model_config("polyglot-ko-5.8b")
config.num_hidden_layers = 1
model = random_model(config, torch.bfloat16, torch.device("cuda"))
sparsify(model, SparsityConfig("magnitude", "2:4"))
print(autotune_kernels(model))
"""
# Also of runs that were killed before they drew.
FIGURES = """
import sys
from pathlib import Path
from optimum_ksparse.study.benchmark import BenchResults, draw_speedup
paths = sorted(Path(sys.argv[1]).glob("*-results.json"))
found = [BenchResults.load(path) for path in paths]
for path, results in zip(paths, found):
    draw_speedup(results, path.with_name(path.name.replace("results.json", "speedup.png")))
for results in found:
    print(results)
"""
FIGURES_STEP = (0.05, [sys.executable, "-c", FIGURES, "{folder}"])
# name: share of the time, command.
STEPS = {
    "test": (0.20, [*TEST, "tests/kernels/test_gpu.py", "tests/kernels/test_kernels.py", "-m", "gpu", "--maxfail=10"]),
    "layers": (0.30, [*BENCH, "--models", "polyglot-ko-5.8b", "llama-3-8b"]),
    "values": (0.09, [*BENCH, "--shapes", "4096x4096", "--tokens", "1", "16", "256", "--values", "int8", "int4"]),
    "decode": (0.20, [*BENCH, "--whole-models", "polyglot-ko-5.8b", "--patterns", "2:4"]),
    "autotune": (0.06, [sys.executable, "-c", AUTOTUNE]),
    "small": (0.10, [*BENCH, "--models", "gemma-3-270m", "--tokens", "1", "16", "128"]),
    "figures": FIGURES_STEP,
}
QUICK = {
    "test": (0.35, [*TEST, "tests/kernels/test_kernels.py", "-k", "formulas"]),
    "layers": (0.3, [*BENCH, "--shapes", "64x64", "--tokens", "1", "16"]),
    "decode": (0.3, [*BENCH, "--whole-models", "gemma-3-270m", "--layers", "1", "--prompt-tokens", "8"]),
    "figures": FIGURES_STEP,
}


def run_step(command: list[str], log: Path, seconds: float, environment: dict[str, str]) -> str:
    """Runs a process for so many seconds at most; its exit status, or "out of time"."""
    grace = min(GRACE, seconds / 4)
    with open(log, "w", encoding="utf-8") as stream:
        output = {"stdout": stream, "stderr": subprocess.STDOUT}
        # Where this script runs in the background, interrupts are ignored, and a child would inherit that.
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        how = {"cwd": REPOSITORY, "env": environment, "start_new_session": True, "preexec_fn": heed}
        process = subprocess.Popen(command, **how, **output)
        try:
            return str(process.wait(seconds - grace))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                pass
            return "out of time"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # what it started too
            except ProcessLookupError:
                pass
            process.wait()


def main(folder: Path, minutes: float, quick: bool, steps: dict | None = None) -> int:
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    summary = {}
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "KSPARSE_CACHE": str(folder)}
    for name, (share, command) in (steps or (QUICK if quick else STEPS)).items():
        started = time.monotonic()
        own, log = folder / name, folder / f"{name}.log"
        command = [part if "\n" in part else part.format(own=own, folder=folder) for part in command]
        code = run_step(command, log, 60 * minutes * share, environment)
        for file in own.glob("*"):
            os.replace(file, folder / f"{name}-{file.name}")
        if own.is_dir():
            own.rmdir()
        summary[name] = {"ended": code, "seconds": round(time.monotonic() - started, 1)}
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
        print(f"== {name}: {summary[name]}", *tail, sep="\n", flush=True)
    return int(any(step["ended"] != "0" for step in summary.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    sys.exit(main(arguments.folder, arguments.minutes, arguments.quick))
