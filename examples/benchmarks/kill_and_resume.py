"""Kills a pruning run at random moments and lets it go on, until it is done; the result must have the same bytes.

python examples/benchmarks/kill_and_resume.py [MODEL] [--kills 20] [--processes 1] [-- further flags of `prune`]

MODEL is a folder or Hub id; without it a small one with random weights is made. Each run is `optimum-cli ksparse prune
--stream`, killed by SIGKILL at a random moment of its start, or between zero and one and a half blocks after one to
four more are done; one that ends before is compared, and the next one begins anew. All processes are killed at once.
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
logging.disable_progress_bar()
MEMORY = ("0", "4GB")  # activations in files or in memory: one of them is drawn for each run
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
    prune = [
        "-m",
        "optimum.commands.optimum_cli",
        "ksparse",
        "prune",
        model,
        str(output),
        "--stream",
        "--json",
        *flags,
    ]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(launch if processes > 1 else []), *prune]


def start(run: list[str], environment: dict[str, str]) -> subprocess.Popen:
    """Starts a run in a group of its own; a line comes out for each block, and one at the end."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    return subprocess.Popen(run, start_new_session=True, env=environment, **pipes)


def state(output: Path) -> str:
    """How far a run has come."""
    journal = output / ".ksparse-pruning" / "journal.json"
    if not journal.exists():
        return "the checkpoint is there" if (output / "config.json").exists() else "no journal yet"
    found = json.loads(journal.read_text())
    return f"{len(found['blocks'])} blocks, {found['phase']}"


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
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
        # One thread: so small a model gains nothing from two, and the machine may be busy.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        begun = time.perf_counter()
        undisturbed = start(command(model, whole, args.processes, flags), environment)
        moments = [time.perf_counter() - begun for _ in undisturbed.stdout]  # of the blocks, and of the end
        assert undisturbed.wait() == 0, "the undisturbed run failed"
        block = (moments[-1] - moments[0]) / len(moments[1:])
        expected, kills, ends = digests(whole), 0, 0
        print(f"undisturbed: {moments[-1]:.1f} s, {block:.2f} s a block; {len(expected)} files", flush=True)
        while kills < args.kills or not ends:
            run = command(model, output, args.processes, [*flags, "--activation-memory", draw.choice(MEMORY)])
            process = start(run, environment)
            blocks = draw.randint(0, 4)
            if kills < args.kills and all(process.stdout.readline() for _ in range(blocks)):
                time.sleep(draw.uniform(0, 1.5 * block if blocks else moments[0]))
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.read()
            if process.wait() == -signal.SIGKILL:
                kills += 1
                print(f"kill {kills}: {state(output)}", flush=True)
                continue
            assert process.returncode == 0, f"exit code {process.returncode}: {' '.join(run)}"
            found, ends = digests(output), ends + 1
            assert found == expected, {name for name in {*found, *expected} if found.get(name) != expected.get(name)}
            print(f"ended, {len(found)} files with the same bytes", flush=True)
            shutil.rmtree(output)
            if kills >= args.kills:
                break
    print(f"{kills} kills, {ends} runs to the end: identical bytes each time")


if __name__ == "__main__":
    main()
