"""Peak memory of training an adapter of each kind on a sparse model, beside plain LoRA.

python examples/benchmarks/lora_memory.py [--hidden 2048] [--layers 4] [--tokens 512] [--steps 3] [--dtype float32]

A Llama with random weights is pruned to 2:4 by magnitude and saved. Each figure is VmHWM of a fresh process that loads
it, adds an adapter of rank 8 to all its linear layers and trains for some steps with AdamW; "loaded" only loads it.
"""

import argparse
import subprocess
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from optimum_ksparse import SparsityConfig, sparsify

METHODS = ("loaded", "lora", "masked", "dora", "hira")
_CHILD = """
import sys, time, torch
import optimum_ksparse
from optimum_ksparse.adapters import SparseLoraConfig, prepare_for_training
from optimum_ksparse.pruning.memory import process_status
from peft import HiraConfig, get_peft_model
from transformers import AutoModelForCausalLM
method, folder, tokens, steps = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
seconds = 0.0
if method != "loaded":
    settings = {"r": 8, "target_modules": "all-linear"}
    lora = {"masked": method == "masked", "use_dora": method == "dora"}
    config = HiraConfig(**settings) if method == "hira" else SparseLoraConfig(**settings, **lora)
    model = get_peft_model(prepare_for_training(model, gradient_checkpointing=False), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, 1024, (1, int(tokens)), generator=torch.Generator().manual_seed(0))
    for _ in range(int(steps)):
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
print(process_status()["VmHWM"], seconds)
"""


def measure(hidden: int, layers: int, tokens: int, steps: int, dtype: str) -> dict[str, tuple[int, float]]:
    """Peak bytes of each method, and the seconds of its last step."""
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_attention_heads": hidden // 64}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=1024, max_position_embeddings=tokens)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    sparsify(model, SparsityConfig("magnitude", "2:4"))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = {}
        for method in METHODS:
            command = [sys.executable, "-c", _CHILD, method, folder, str(tokens), str(steps)]
            peak, seconds = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.split()[-2:]
            found[method] = int(peak), float(seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("hidden", 2048), ("layers", 4), ("tokens", 512), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    found = measure(**vars(parser.parse_args()))
    plain, empty = found["lora"][0], found["loaded"][0]
    for method, (peak, seconds) in found.items():
        training = f", {(peak - empty) / (plain - empty):.2f} of what it adds to the loaded model" * (peak != empty)
        print(
            f"{method}: peak {peak / 1e9:.2f} GB, {peak / plain:.2f} of plain LoRA{training}; {seconds:.1f} s a step"
        )


if __name__ == "__main__":
    main()
