"""What LoRA wins back on KorQuAD 1.0: a dense model and its sparse one, tuned with the same budget.

python examples/benchmarks/korquad_recovery.py DENSE SPARSE KORQUAD.json OUT [settings of ksparse finetune korquad]

`lora` trains adapter and span head, `head` the head (and the two markers) alone: what a backbone knows before LoRA.
Each run is a process of its own and writes into `OUT/<model>-<run>`; a run that was cut off goes on, and one that is
finished is not run again, when the script is called again with the same arguments. At the end `OUT/results.json` holds
the figures, and `OUT/korquad_recovery.png` the curves of loss and F1 (extra `plot`). The data are split by article,
80 % to train.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from optimum_ksparse.checkpoint.staging import write_text

MODELS, RUNS = ("dense", "sparse"), ("lora", "head")
SETTINGS = "--max-steps 200 --batch-size 16 --micro-batch-size 8 --warmup-steps 20 --save-steps 10 --eval-every 50"


def draw(records: dict[str, Any], path: Path) -> None:
    """Loss and F1 by step, a line for each run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, record in records.items():
        losses, width = record["loss"], max(1, len(record["loss"]) // 20)
        parts = [losses[max(0, i - width + 1) : i + 1] for i in range(len(losses))]
        style = {"color": f"C{MODELS.index(name.split('-')[0])}", "linestyle": "-" if name.endswith("lora") else ":"}
        left.plot(range(1, len(losses) + 1), [sum(part) / len(part) for part in parts], label=name, **style)
        rows = record["history"]
        right.plot([row["step"] for row in rows], [row["f1"] for row in rows], marker="o", label=name, **style)
    left.set(xlabel="step", ylabel="loss (running mean)", title="KorQuAD 1.0, training loss")
    right.set(xlabel="step", ylabel="F1 in per cent", title="KorQuAD 1.0, F1", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in MODELS:
        parser.add_argument(name, help=f"folder or Hub id of the {name} model")
    parser.add_argument("korquad", help="JSON in the form of SQuAD 1.1")
    parser.add_argument("out", type=Path)
    args, more = parser.parse_known_args()
    records = {}
    for run in RUNS:
        for model in MODELS:
            # Threads that spin while they wait stand in each other's way where other work shares the machine.
            environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
            output = args.out / f"{model}-{run}"
            words = [getattr(args, model), str(output), "--train-file", args.korquad, "--dtype", "float32"]
            words += [*SETTINGS.split(), *more, "--head-only", str(run == "head").lower()]
            command = [sys.executable, "-m", "optimum_ksparse", "finetune", "korquad", *words]
            subprocess.run(command, check=True, env=environment)
            records[output.name] = json.loads((output / "finetuning.json").read_text(encoding="utf-8"))
    write_text(args.out / "results.json", json.dumps(records, indent=2, ensure_ascii=False) + "\n")
    draw(records, args.out / "korquad_recovery.png")
    print("| run | steps | loss at the end | exact match | F1 | questions |", "|---" * 6 + "|", sep="\n")
    for name, record in records.items():
        last, row = record["loss"][-10:], record["results"]
        figures = f"{sum(last) / len(last):.3f} | {row['exact_match']:.2f} | {row['f1']:.2f} | {row['num_samples']}"
        print(f"| {name} | {record['steps']} | {figures} |")


if __name__ == "__main__":
    main()
