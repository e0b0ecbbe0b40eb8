"""What `make release-check` runs where this package alone has been installed: a tiny model learns a sentence, is
pruned and saved; a process that imports only transformers loads it and writes the sentence."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import optimum_ksparse

SENTENCE = "성긴 모델은 가중치의 절반으로 같은 문장을 쓴다."
WRITE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "optimum_ksparse" not in sys.modules
model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))
assert model.sparsity_report.density == 0.5
tokens = tokenizer(sys.argv[2], return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=80, do_sample=False)[0], skip_special_tokens=True))
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and the end."""
    alphabet = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="</s>")


def main(folder: str) -> None:
    #    assert Path(optimum_ksparse.__file__).is_relative_to(sys.prefix), optimum_ksparse.__file__
    assert Path(optimum_ksparse.__file__).with_name("py.typed").is_file()
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=0, **sizes))
    tokens = tokenizer(SENTENCE + "</s>", return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    report = optimum_ksparse.sparsify(model, optimum_ksparse.SparsityConfig(pattern="2:4", dataset=tokens))
    print(report)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    command = [sys.executable, "-c", WRITE, folder, SENTENCE[:2]]
    written = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", cwd=folder).stdout.strip()
    print(written)
    assert written == SENTENCE


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
