"""Kills a pruning run at random moments and lets it go on, until it is done; the result must have the same bytes.

python examples/benchmarks/kill_and_resume.py [MODEL] [--kills 20] [--processes 1] [-- further flags of `prune`]

MODEL is a folder or Hub id; without it a small one with random weights is made. Each run is `optimum-cli ksparse prune
--stream`, killed by SIGKILL between the end of its imports and a little after its end as it would be undisturbed; one
that ends before is compared, and the next one begins anew. With several processes all are killed at once.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, logging

logging.set_verbosity_error()
SAMPLES = Path(__file__).parent.parent / "data" / "korean_calibration.txt"


def make_model(folder: Path) -> None:
    """A Llama of 12 blocks with random weights, and a tokenizer of single bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12}
    config = LlamaConfig(**sizes, num_attention_heads=8, bos_token_id=0, eos_token_id=1, max_position_embeddings=256)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="5MB")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, and of the report but for its times and memory."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        if path.name == "sparsity_report.json":
            report = json.loads(content)
            for row in (report, *report["layers"]):
                row.pop("seconds")
            report.pop("peak_memory_bytes")
            content = json.dumps(report).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def command(model: str, output: Path, processes: int, flags: list[str]) -> list[str]:
    prune = ["-m", "optimum.commands.optimum_cli", "ksparse", "prune", model, str(output), "--stream", *flags]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(launch if processes > 1 else []), *prune]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--activation-memory", nargs="+", default=["0", "4GB"], help="one of them is drawn for a run")
    args, flags = parser.parse_known_args()
    flags = [flag for flag in flags if flag != "--"] or [
        *("--method", "sparsegpt", "--dataset", str(SAMPLES), "--num-samples", "16", "--seq-len", "128"),
    ]
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        model, whole, output = args.model, Path(scratch, "undisturbed"), Path(scratch, "killed")
        if model is None:
            model = str(Path(scratch, "model"))
            make_model(Path(model))
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        imports = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import optimum_ksparse"], check=True)
        imports = time.perf_counter() - imports
        duration = time.perf_counter()
        subprocess.run(command(model, whole, args.processes, flags), check=True, **quiet)
        duration = time.perf_counter() - duration
        expected, kills, ends = digests(whole), 0, 0
        print(f"undisturbed: {duration:.1f} s, of which {imports:.1f} s are imports; {len(expected)} files", flush=True)
        while True:
            limit = draw.choice(args.activation_memory)
            run = command(model, output, args.processes, [*flags, "--activation-memory", limit])
            process = subprocess.Popen(run, start_new_session=True, **quiet)
            wait = draw.uniform(imports, 1.1 * duration) if kills < args.kills else None
            try:
                code = process.wait(wait)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
                journal = output / ".ksparse-pruning" / "journal.json"
                done = json.loads(journal.read_text()) if journal.exists() else {"blocks": [], "phase": "before"}
                print(f"kill {kills} after {wait:.1f} s: {len(done['blocks'])} blocks, {done['phase']}", flush=True)
                continue
            assert code == 0, f"exit code {code}: {' '.join(run)}"
            found, ends = digests(output), ends + 1
            assert found == expected, {name for name in {*found, *expected} if found.get(name) != expected.get(name)}
            print(f"ended, {len(found)} files with the same bytes", flush=True)
            if kills >= args.kills:
                break
            shutil.rmtree(output)
    print(f"{kills} kills, {ends} runs to the end: identical bytes each time")


if __name__ == "__main__":
    main()
