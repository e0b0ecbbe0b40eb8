"""What LoRA wins back on KorQuAD 1.0: a dense model and its sparse one, tuned with the same budget.

python examples/benchmarks/korquad_recovery.py DENSE SPARSE KORQUAD.json OUT [--max-steps 200] [--runs lora head]

`lora` trains adapter and span head, `head` the head (and the two new tokens) alone: what a backbone knows before LoRA.
Each run is a process of its own and writes into `OUT/<model>-<run>`; a run that was cut off goes on, and one that is
finished is not run again, when the script is called again with the same arguments. At the end `OUT/results.json` holds
the figures, and `OUT/korquad_recovery.png` the curves of loss and F1 (extra `plot`).

The data are split by article, 80 % to train. F1 on the way is of the first `--eval-every-questions` test questions,
F1 at the end of `--max-eval-questions`, all by default.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_ksparse import SparseLinear
from optimum_ksparse.checkpoint.staging import write_text
from optimum_ksparse.study.finetuning import FinetuningSettings
from optimum_ksparse.study.finetuning.korquad import finetune_korquad, read_korquad, split_by_article

MODELS, RUNS = ("dense", "sparse"), ("lora", "head")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("dense", "sparse"):
        parser.add_argument(name, help=f"folder or Hub id of the {name} model")
    parser.add_argument("korquad", help="JSON in the form of SQuAD 1.1")
    parser.add_argument("out", type=Path)
    for name, value in {
        "max-steps": 200,
        "batch-size": 16,
        "micro-batch-size": 8,
        "warmup-steps": 20,
        "save-steps": 10,
        "eval-every": 50,
        "eval-every-questions": 100,
        "seed": 0,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--max-eval-questions", type=int)
    parser.add_argument("--max-train-questions", type=int)
    parser.add_argument("--max-characters", type=int, help="leave out questions on longer paragraphs")
    parser.add_argument("--float32", action="store_true", help="products in float32 instead of bfloat16")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=["lora"])
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "RUN"), help="run this one here, and write no results")
    return parser.parse_args()


def run_one(args: argparse.Namespace, model_name: str, run: str) -> None:
    """Trains and measures one model in this process."""
    source = getattr(args, model_name)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, SparseLinear):
            module.densify = "lazy"  # the weights are frozen: decompressed once, as fast as the dense ones
    names = ("max_steps", "batch_size", "micro_batch_size", "warmup_steps", "save_steps", "learning_rate", "seed")
    settings = FinetuningSettings(**{name: getattr(args, name) for name in names}, bf16=not args.float32)
    train, test = split_by_article(read_korquad(args.korquad), seed=args.seed)
    if args.max_characters is not None:
        name = f"paragraphs of at most {args.max_characters} characters"
        train, test = (
            part.part([q for q in part.questions if len(q.context) <= args.max_characters], f"{part.split}, {name}")
            for part in (train, test)
        )
    finetune_korquad(
        model,
        AutoTokenizer.from_pretrained(source),
        train,
        settings,
        args.out / f"{model_name}-{run}",
        eval_data=test,
        head_only=run == "head",
        max_train_questions=args.max_train_questions,
        max_eval_questions=args.max_eval_questions,
        eval_every=args.eval_every,
        eval_every_questions=args.eval_every_questions,
    )


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """Run → what its `finetuning.json` holds, of the finished ones."""
    paths = {f"{model}-{run}": args.out / f"{model}-{run}/finetuning.json" for run in RUNS for model in MODELS}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


def draw(found: dict[str, Any], path: Path) -> None:
    """Loss and F1 by step, a line for each run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, record in found.items():
        losses, width = record["loss"], max(1, len(record["loss"]) // 20)
        means = [
            sum(losses[max(0, i - width + 1) : i + 1]) / len(losses[max(0, i - width + 1) : i + 1])
            for i in range(len(losses))
        ]
        style = {"color": f"C{MODELS.index(name.split('-')[0])}", "linestyle": "-" if name.endswith("lora") else ":"}
        left.plot(range(1, len(losses) + 1), means, label=name, **style)
        rows = record["history"]
        right.plot([row["step"] for row in rows], [row["f1"] for row in rows], marker="o", label=name, **style)
    left.set(xlabel="step", ylabel="loss (running mean)", title="KorQuAD 1.0, training loss")
    right.set(
        xlabel="step", ylabel="F1 in per cent", title="KorQuAD 1.0, F1 on the first test questions", ylim=(0, None)
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    args = arguments()
    if args.one:
        return run_one(args, *args.one)
    for run in args.runs:
        for model in MODELS:
            # Threads that spin while they wait stand in each other's way where other work shares the machine.
            environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
            command = [sys.executable, __file__, *sys.argv[1:], "--one", model, run]
            subprocess.run(command, check=True, env=environment)
    found = collect(args)
    write_text(args.out / "results.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    draw(found, args.out / "korquad_recovery.png")
    print("| run | steps | loss at the end | exact match | F1 | questions |", "|---" * 6 + "|", sep="\n")
    for name, record in found.items():
        last, row = record["loss"][-10:], record["results"]
        figures = f"{sum(last) / len(last):.3f} | {row['exact_match']:.2f} | {row['f1']:.2f} | {row['num_samples']}"
        print(f"| {name} | {record['steps']} | {figures} |")
    return None


if __name__ == "__main__":
    main()
