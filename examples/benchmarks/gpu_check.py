"""Everything that a GPU should show, in one call: tests, benchmark, whole models, figures, all in one folder.

python examples/benchmarks/gpu_check.py FOLDER [--minutes 9] [--quick]

Each step is a process with a time limit of its own, so that one that hangs does not lose the others; `summary.json`
tells how each ended. Needs torch, transformers, triton, pytest, hypothesis and matplotlib. `--quick` takes small
shapes and few tests, to try the script itself, also without a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
BENCH = [sys.executable, "-m", "optimum_ksparse.benchmark"]
TEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# name: share of the time, command; {folder} is the step's own.
STEPS = {
    "test": (0.22, [*TEST, "tests/test_gpu.py", "tests/test_kernels.py", "-m", "gpu", "--maxfail=10"]),
    "layers": (0.38, [*BENCH, "--models", "polyglot-ko-5.8b", "llama-3-8b", "--output", "{folder}"]),
    "decode": (0.22, [*BENCH, "--whole-models", "polyglot-ko-5.8b", "--patterns", "2:4", "--output", "{folder}"]),
    "small": (0.12, [*BENCH, "--models", "gemma-3-270m", "--tokens", "1", "16", "128", "--output", "{folder}"]),
}
QUICK = {
    "test": (0.4, [*TEST, "tests/test_kernels.py", "-k", "formulas"]),
    "layers": (0.3, [*BENCH, "--shapes", "64x64", "--tokens", "1", "16", "--output", "{folder}"]),
    "decode": (
        0.3,
        [*BENCH, "--whole-models", "gemma-3-270m", "--layers", "1", "--prompt-tokens", "8", "--output", "{folder}"],
    ),
}


def main(folder: Path, minutes: float, quick: bool) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    summary = {}
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "KSPARSE_CACHE": str(folder.resolve() / "speeds")}
    for name, (share, command) in (QUICK if quick else STEPS).items():
        started = time.monotonic()
        own = folder.resolve() / name
        with open(folder / f"{name}.log", "w", encoding="utf-8") as log:
            try:
                done = subprocess.run(
                    [part.format(folder=own) for part in command],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=REPOSITORY,
                    env=environment,
                    timeout=60 * minutes * share,
                )
                code = str(done.returncode)
            except subprocess.TimeoutExpired:
                code = "out of time"
        summary[name] = {"ended": code, "seconds": round(time.monotonic() - started, 1)}
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        tail = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
        print(f"== {name}: {summary[name]}", *tail, sep="\n", flush=True)
    return int(any(step["ended"] != "0" for step in summary.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    sys.exit(main(arguments.folder, arguments.minutes, arguments.quick))
