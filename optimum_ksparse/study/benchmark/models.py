"""Whole models: tokens per second of prefill and of decoding, dense and sparse, one after the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, StaticCache

from ...api import sparsify
from ...checkpoint import sparse_modules
from ...config import SparsityConfig
from ...kernels import time_calls
from ...runtime import autotune_kernels

_REPEATS = 5


def random_model(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of random weights, made where it runs."""
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def bench_model(
    model: PreTrainedModel,
    name: str,
    pattern: str = "2:4",
    *,
    prompt_tokens: int = 1024,
    new_tokens: int = 32,
    batch: int = 1,
) -> dict[str, Any]:
    """A row of results for a model; it is left sparse if it was, and pruned by magnitude to `pattern` otherwise.

    Decoding takes one token a step into a static cache, on a GPU as a CUDA graph, for the dense model too.

    Args:
        prompt_tokens: of the prefill; cut to the model's context.
        new_tokens: steps over which decoding is timed.
    """
    context = getattr(model.config, "max_position_embeddings", prompt_tokens + new_tokens)
    prompt_tokens = max(1, min(prompt_tokens, context - new_tokens - 16))
    if sparse_modules(model):
        patterns = {str(module.pattern) for module in sparse_modules(model).values()}
        pattern = patterns.pop() if len(patterns) == 1 else "mixed"
        order = ("sparse", "dense")
    else:
        order = ("dense", "sparse")
    row: dict[str, Any] = {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "pattern": pattern,
        "batch": batch,
        "prompt_tokens": prompt_tokens,
    }
    for kind in order:
        if kind == "sparse" and not sparse_modules(model):
            sparsify(model, SparsityConfig("magnitude", pattern))
        if kind == "dense" and sparse_modules(model):
            model.dequantize()
        if kind == "sparse":
            autotune_kernels(model)
        prefill, decode, graphs = _speeds(model, batch, prompt_tokens, new_tokens)
        row[f"{kind}_prefill_tokens_per_s"] = round(prefill, 2)
        row[f"{kind}_decode_tokens_per_s"] = round(decode, 2)
        row["cuda_graphs"] = graphs and row.get("cuda_graphs", True)
    for phase in ("prefill", "decode"):
        sparse, dense = (row[f"{kind}_{phase}_tokens_per_s"] for kind in ("sparse", "dense"))
        row[f"{phase}_speedup"] = round(sparse / dense, 4)
    return row


@torch.no_grad()
def _speeds(model: PreTrainedModel, batch: int, prompt_tokens: int, new_tokens: int) -> tuple[float, float, bool]:
    """Tokens per second of prefill and of decoding, and whether the latter was a CUDA graph."""
    device = next(model.parameters()).device
    words = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(words, (batch, prompt_tokens), generator=generator).to(device)
    prefill = _median_seconds(lambda: model(prompt, use_cache=False, logits_to_keep=1), device)

    steps = new_tokens + 16  # those that are not timed too
    cache = StaticCache(config=model.config, max_cache_len=prompt_tokens + steps)
    model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = prompt[:, :1].clone()
    position = torch.full((1, 1), prompt_tokens, device=device)

    def step() -> Any:
        return model(token, past_key_values=cache, position_ids=position, use_cache=True).logits

    if device.type == "cuda":
        try:
            seconds = time_calls([step], device, repeats=new_tokens) / 1e6
            return batch * prompt_tokens / prefill, batch / seconds, True
        except RuntimeError:  # a model that cannot be captured runs step by step
            torch.cuda.synchronize(device)
    seconds = _median_seconds(step, device, min(new_tokens, 8))
    return batch * prompt_tokens / prefill, batch / seconds, False


def _median_seconds(call: Callable[[], Any], device: torch.device, repeats: int = _REPEATS) -> float:
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])  # the first one compiles, and measures kernels
