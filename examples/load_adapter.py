"""An adapter from the Hub, or a folder, on the packed model that it was trained on.

python examples/load_adapter.py me/polyglot-ko-1.3b-2of4-koalpaca "한국의 수도는 어디인가요?"
"""

from __future__ import annotations

import argparse

from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from optimum_ksparse.study.finetuning import koalpaca_prompt


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("adapter", help="folder or Hub id of an adapter that `ksparse finetune koalpaca` made")
    parser.add_argument("instruction")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.adapter)
    model = AutoPeftModelForCausalLM.from_pretrained(args.adapter).eval()  # the base is read from its own place
    prompt = tokenizer(koalpaca_prompt(args.instruction), return_tensors="pt", return_token_type_ids=False)
    generated = model.generate(**prompt, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip())


if __name__ == "__main__":
    main()
