"""Loads a sparse checkpoint and writes a Korean sentence: python examples/write.py <folder or Hub id> [beginning]"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, logging

logging.set_verbosity_error()
source, beginning = (*sys.argv[1:3], "대한민국의 수도는")[:2]
model = AutoModelForCausalLM.from_pretrained(source)
tokenizer = AutoTokenizer.from_pretrained(source)
inputs = tokenizer(beginning, return_tensors="pt", return_token_type_ids=False)
written = model.generate(**inputs, max_new_tokens=24, do_sample=False, repetition_penalty=1.2)
print(" ".join(tokenizer.decode(written[0], skip_special_tokens=True).split()))
