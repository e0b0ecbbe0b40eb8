"""What merging an adapter into sparse weights costs: perplexity unmerged, merged by mask, and merged by solving.

python examples/benchmarks/merge_perplexity.py MODEL CALIBRATION.jsonl EVALUATION.jsonl WORK [--steps 100] [--rank 8] …

The model is pruned to 2:4 by SparseGPT, LoRA on all linear maps of its blocks is trained on the calibration text, then
each way of merging is measured. The pruned model and the adapter are kept in WORK and used again by the next run with
the same settings. Figures are printed as lines of JSON.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, logging, set_seed

from optimum_ksparse import SparsityConfig, evaluate_perplexity, merge_adapter
from optimum_ksparse.data import prepends_bos
from optimum_ksparse.nn import densified


def read(path: str) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def cut(tokenizer, texts: list[str], length: int) -> torch.Tensor:
    """All of the text as samples [samples, length], each with the beginning token where the tokenizer adds one."""
    prefix = [tokenizer.bos_token_id] if prepends_bos(tokenizer, None) else []
    ids, step = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"], length - len(prefix)
    return torch.tensor([prefix + ids[i : i + step] for i in range(0, len(ids) - step, step)])


def pruned(args, tokenizer, samples: torch.Tensor):
    folder = Path(args.work) / f"pruned-{args.pattern.replace(':', 'of').replace('%', 'percent')}"
    if not folder.is_dir():
        config = SparsityConfig("sparsegpt", args.pattern, dataset=samples)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, sparsity_config=config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), folder


def trained(args, tokenizer, texts: list[str]):
    """The pruned model with its adapter, and the folder of that."""
    base, source = pruned(args, tokenizer, cut(tokenizer, texts, 512)[: args.num_samples])
    folder = (
        Path(args.work) / f"adapter-{source.name}-r{args.rank}-{args.steps}x{args.batch}x{args.length}-{args.lr:g}"
    )
    if not folder.is_dir():
        set_seed(0)
        config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        peft_model = get_peft_model(base, config)
        data = [{"input_ids": ids, "labels": ids} for ids in cut(tokenizer, texts, args.length)]
        settings = TrainingArguments(
            output_dir=str(Path(args.work) / "trainer"),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 20,
            bf16=args.bf16,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        )
        started = time.perf_counter()
        result = Trainer(model=peft_model, args=settings, train_dataset=data).train()
        seconds = round(time.perf_counter() - started, 1)
        print(json.dumps({"run": "training", "seconds": seconds, "loss": result.training_loss}), flush=True)
        peft_model.save_pretrained(folder)
        base, _ = pruned(args, tokenizer, samples=torch.empty(0))
    return PeftModel.from_pretrained(base, folder).eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "calibration", "evaluation", "work"):
        parser.add_argument(name)
    for name, value in {
        "pattern": "2:4",
        "num_samples": 32,
        "rank": 8,
        "steps": 100,
        "batch": 4,
        "length": 256,
    }.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--windows", type=int, default=12, help="of 512 tokens, to measure")
    parser.add_argument("--bf16", action="store_true", help="train under autocast to bfloat16")
    parser.add_argument("--runs", nargs="+", default=["base", "unmerged", "masked", "solve"])
    args = parser.parse_args()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = read(args.calibration)
    for run in args.runs:
        model, started = trained(args, tokenizer, texts), time.perf_counter()
        figures = {}
        if run == "base":
            model = model.unload()
        elif run == "unmerged":
            model = model.get_base_model()  # with PEFT's layers in it
        else:
            samples = cut(tokenizer, texts, 512)[: args.num_samples]
            model = merge_adapter(model, method=run, dataset=samples)
            figures = model.ksparse.merge.totals()
        seconds = round(time.perf_counter() - started, 1)
        with densified(model):
            result = evaluate_perplexity(
                model, tokenizer, read(args.evaluation), seq_len=512, max_tokens=args.windows * 512
            )
        print(json.dumps({"run": run, "merge_seconds": seconds, **figures, **result}), flush=True)


if __name__ == "__main__":
    main()
