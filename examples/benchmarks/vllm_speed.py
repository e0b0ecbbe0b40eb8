"""Tokens per second of vLLM, dense and packed, under 1 and 16 requests at a time: FOLDER/results.json.

python examples/benchmarks/vllm_speed.py FOLDER MODEL [--dtype bfloat16] [--tokens 32]

In an environment with vLLM (`make test-vllm` makes one). MODEL, a folder, is measured as it is, and pruned to 2:4 by
magnitude and stored packed: its speed does not depend on what is kept. What results.json has is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

CONCURRENT = (1, 16)
PROMPT = 64


def measure(folder: str, dtype: str, new_tokens: int) -> dict[str, float]:
    """Generated tokens per second, by the number of requests at a time."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    length = PROMPT + new_tokens
    settings = {"dtype": dtype, "max_model_len": length, "max_num_seqs": max(CONCURRENT), "enforce_eager": True}
    llm = LLM(folder, distributed_executor_backend="uni", kv_cache_memory_bytes=1 << 29, **settings)
    sampling = SamplingParams(max_tokens=new_tokens, min_tokens=new_tokens, temperature=0, detokenize=False)
    speeds = {}
    for number in CONCURRENT:
        best = float("inf")
        for attempt in range(3):  # the first one warms up; prompts differ, so that no prefix is kept
            prompts = [[2, *range(first, first + PROMPT - 1)] for first in range(100 * attempt + 7, 10**6, 300)][
                :number
            ]
            start = time.perf_counter()
            llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
            best = min(best, time.perf_counter() - start)
        speeds[str(number)] = round(number * new_tokens / best, 1)
    return speeds


def pruned(model: str, folder: str) -> str:
    from transformers import AutoModelForCausalLM

    from optimum_ksparse import SparsityConfig

    config = SparsityConfig("magnitude", "2:4", dataset=None)
    AutoModelForCausalLM.from_pretrained(model, sparsity_config=config).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    parser.add_argument("--kinds", nargs="+", default=["dense", "packed"], choices=["dense", "packed"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for kind in arguments.kinds:
        name = f"{kind} {arguments.dtype}"
        if name in results:
            continue
        with tempfile.TemporaryDirectory() as folder:
            model = arguments.model if kind == "dense" else pruned(arguments.model, folder)
            results[name] = measure(model, arguments.dtype, arguments.tokens)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(name, results[name])


if __name__ == "__main__":
    main()
