"""LoRA on a packed model with the `SFTTrainer` of TRL, on instructions and answers.

python examples/lora_sft.py polyglot-ko-1.3b-2of4 koalpaca.jsonl adapter
"""

from __future__ import annotations

import argparse
import json

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from optimum_ksparse.study.finetuning import koalpaca_prompt, linear_targets


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder or Hub id of a sparse model")
    parser.add_argument("data", help="file of JSON lines with `instruction` and `output`")
    parser.add_argument("output", help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model)
    with open(args.data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    examples = Dataset.from_list(
        [{"prompt": koalpaca_prompt(row["instruction"]), "completion": f" {row['output']}"} for row in rows]
    )
    arguments = SFTConfig(
        output_dir=args.output,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=3e-4,
        max_length=256,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=linear_targets(model), task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(args.output)


if __name__ == "__main__":
    main()
