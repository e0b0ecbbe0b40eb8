"""Peak memory of pruning a checkpoint from disk to disk, beside the same in memory.

python examples/benchmarks/streaming_memory.py [--gigabytes 2.2] [--method wanda] [--samples 4] [--seq-len 64] [--json]

A Llama with random weights in bfloat16 is written, one file a block. Each figure is VmHWM, read by a process that did
nothing else from its own status file (`ru_maxrss` is inherited over exec): one that imports the package, one that
calls `prune_checkpoint`, one that calls `from_pretrained` with the same config and saves the result.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "vocab_size": 4096, "num_attention_heads": 16}
_CHILD = """
import sys, torch
import optimum_ksparse
from optimum_ksparse import SparsityConfig, prune_checkpoint
from optimum_ksparse.pruning.memory import process_status
from transformers import AutoModelForCausalLM
what, source, output, method, samples, seq_len = sys.argv[1:]
ids = torch.randint(0, 4096, (int(samples), int(seq_len)), generator=torch.Generator().manual_seed(0))
config = SparsityConfig(method, "2:4", dataset=ids)
if what == "streaming":
    prune_checkpoint(source, output, config, device="cpu")
elif what == "in memory":
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", sparsity_config=config)
    model.save_pretrained(output)
print(process_status()["VmHWM"])
"""


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Writes it; the number of its bytes."""
    with torch.device("meta"):
        block = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, num_hidden_layers=1), dtype=torch.bfloat16)
    shapes = {name: tensor.shape for name, tensor in block.state_dict().items()}
    inside = {name: shape for name, shape in shapes.items() if ".layers.0." in name}
    blocks = int(gigabytes * 1e9 / (2 * sum(shape.numel() for shape in inside.values()))) + 1
    draw = torch.Generator().manual_seed(0)
    LlamaConfig(
        **SIZES, num_hidden_layers=blocks, dtype="bfloat16", architectures=["LlamaForCausalLM"]
    ).save_pretrained(folder)
    groups = [{name: shape for name, shape in shapes.items() if name not in inside}]
    groups += [{name.replace(".0.", f".{i}.", 1): shape for name, shape in inside.items()} for i in range(blocks)]
    drawn = {  # once: blocks have the same numbers, each at other places
        name: (torch.randn(shape, generator=draw) * (1 if "norm" in name else shape[-1] ** -0.5)).bfloat16()
        for name, shape in shapes.items()
    }
    weight_map, size = {}, 0
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        state = {name: drawn[re.sub(r"\.\d+\.", ".0.", name)].roll(number) for name in group}
        save_file(state, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(state, file)
        size += sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def measure(
    gigabytes: float, method: str, samples: int, seq_len: int, ways: Sequence[str] = ("streaming", "in memory")
) -> dict[str, int]:
    """All figures in bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "dense")
        source.mkdir()
        found = {"checkpoint": make_checkpoint(source, gigabytes)}
        for what in ("importing", *ways):
            arguments = [what, str(source), str(Path(scratch, what)), method, str(samples), str(seq_len)]
            done = subprocess.run([sys.executable, "-c", _CHILD, *arguments], stdout=subprocess.PIPE, check=True)
            found[what] = int(done.stdout.split()[-1])
    found["embeddings"] = 2 * 2 * SIZES["vocab_size"] * SIZES["hidden_size"]
    found["activations"] = 2 * samples * seq_len * SIZES["hidden_size"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = measure(args.gigabytes, args.method, args.samples, args.seq_len)
    if args.json:
        print(json.dumps(found))
        return
    over = {what: found[what] - found["importing"] for what in ("streaming", "in memory")}
    print(f"checkpoint {found['checkpoint'] / 1e9:.2f} GB, {args.method} 2:4, {args.samples} x {args.seq_len} tokens")
    for what, size in over.items():
        print(f"{what}: peak {found[what] / 1e9:.2f} GB, {size / 1e9:.2f} GB over a process that only imports")
    rest = found["embeddings"] + found["activations"]
    print(f"embeddings {found['embeddings'] / 1e9:.3f} GB, activations {found['activations'] / 1e9:.3f} GB")
    print(f"streaming but for these: {(over['streaming'] - rest) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
