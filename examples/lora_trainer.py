"""LoRA on a packed 2:4 model with the `Trainer` of transformers, then a merge that keeps every zero.

python examples/lora_trainer.py polyglot-ko-1.3b-2of4 texts.txt merged
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from optimum_ksparse.adapters import SparseLoraConfig, merge_adapter, prepare_for_training
from optimum_ksparse.study.finetuning import linear_targets


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder or Hub id of a sparse model")
    parser.add_argument("texts", help=".txt file, paragraphs apart by blank lines")
    parser.add_argument("output", help="folder for the merged model, which is as sparse as before")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(args.model)  # packed: sparse modules, trained through as they are
    targets = linear_targets(base)  # all linear maps of attention and MLP
    # The adapter sees the mask while it trains, so that merging changes nothing in what the model computes.
    config = SparseLoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets, masked=True)
    model = get_peft_model(prepare_for_training(base, gradient_checkpointing=False), config)
    model.print_trainable_parameters()

    texts = Path(args.texts).read_text(encoding="utf-8").split("\n\n")
    examples = [{"input_ids": tokenizer(text, truncation=True, max_length=64)["input_ids"]} for text in texts]
    arguments = TrainingArguments(
        output_dir=f"{args.output}-checkpoints",
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=3e-4,
        save_strategy="no",
        report_to="none",
    )
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collate).train()

    merged = merge_adapter(model)
    merged.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
