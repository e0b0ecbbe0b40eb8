"""Tiny random models with text of their own, for vLLM; its engine in the process of a test."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_ksparse import SparsityConfig, sparsify

from ..conftest import VOCABULARY, make_config

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # each process would compile what it computes beside the model
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
SETTINGS: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 4,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "disable_log_stats": True,
    "skip_tokenizer_init": True,
}
PROMPTS = [[1, *range(first, first + 7)] for first in (10, 100, 200)]
NEW_TOKENS = 64

_LLAMA = {"hidden_size": 128, "intermediate_size": 136, "num_key_value_heads": 4, "head_dim": 32}
# vLLM's kernels for CPUs take heads of 32 and more.
SIZES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": _LLAMA,
    "gemma3": {**_LLAMA, "query_pre_attn_scalar": 32},
    "gpt_neox": {"hidden_size": 128, "intermediate_size": 136},
    "gpt2": {"hidden_size": 128},
    "opt": {"hidden_size": 128, "ffn_dim": 136, "word_embed_proj_dim": 128},
}


def sparse_model(name: str, pattern: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """A random sparse model; its weights are large enough that it writes no token over and over."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(name, max_position_embeddings=128, **SIZES[name]))
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = 3 * parameter if parameter.ndim > 1 else parameter + 0.1 * noise
    token_ids = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
    config = {"method": "magnitude", "pattern": pattern, "dataset": token_ids, **settings}
    sparsify(model.to(dtype).eval(), SparsityConfig(**config))
    return model


@torch.no_grad()
def greedy(
    model: PreTrainedModel, prompts: list[list[int]] = PROMPTS, new_tokens: int = NEW_TOKENS
) -> list[list[int]]:
    """What transformers writes, without end."""
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    inputs = [torch.tensor([ids]) for ids in prompts]
    outputs = [model.generate(ids, attention_mask=torch.ones_like(ids), **lengths) for ids in inputs]
    return [output[0, ids.shape[1] :].tolist() for output, ids in zip(outputs, inputs, strict=True)]


@contextmanager
def engine(folder: Path | str, ranks: int = 1, **settings: Any) -> Iterator[Any]:
    """vLLM's `LLM`: in this process with one rank, otherwise with processes of its own."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    os.environ |= {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(ranks > 1))}
    backend = "uni" if ranks == 1 else "mp"
    options = {"dtype": "float32", "distributed_executor_backend": backend, "tensor_parallel_size": ranks, **settings}
    llm = None
    try:
        llm = LLM(str(folder), **{**SETTINGS, **options})
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def written(
    llm: Any, prompts: list[list[int]] = PROMPTS, new_tokens: int = NEW_TOKENS, **options: Any
) -> list[list[int]]:
    """What vLLM writes."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=new_tokens, min_tokens=new_tokens, temperature=0, detokenize=False)
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    return [list(result.outputs[0].token_ids) for result in llm.generate(inputs, sampling, use_tqdm=False, **options)]


def modules_of(llm: Any, collect: Callable[[torch.nn.Module], Any]) -> Any:
    """`collect` of vLLM's model."""
    return llm.apply_model(collect)[0]
