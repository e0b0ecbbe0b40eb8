"""How fast a whole model decodes, on the machine where it is."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StaticCache

from ..blocks import evaluation_mode
from ..blocks.running import device_of
from ..data.tokens import context_length
from ..kernels import fast_products, time_calls
from ..records import Between, Positive
from .running import environment, machine
from .tasks import Task, add_task

if TYPE_CHECKING:
    from .protocol import EvaluationProtocol

_PROMPT, _NEW = 256, 32  # tokens
_NOT_TIMED = 16  # steps beside those that are: the first ones compile, or are recorded


@dataclass(frozen=True, kw_only=True)
class _Speed(Task):
    """`decoding_speed` of one sequence. Figures of another machine, number of threads or dtype are not comparable."""

    def request(self, model: PreTrainedModel, protocol: EvaluationProtocol) -> dict[str, Any]:
        prompt_tokens = fitting_prompt(model, _PROMPT, _NEW)
        return {**machine(device_of(model)), "prompt_tokens": prompt_tokens, "new_tokens": _NEW}

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: EvaluationProtocol
    ) -> dict[str, Any]:
        how = self.request(model, protocol)
        per_second, is_graph = decoding_speed(model, 1, how["prompt_tokens"], how["new_tokens"])
        figures = {"tokens_per_s": round(per_second, 2), "cuda_graph": is_graph}
        return {**figures, **how, "batch_size": 1, **environment(model)}


SPEED = add_task(
    _Speed(
        name="speed",
        word="speed",
        title="decoding",
        metrics={"tokens_per_s": Annotated[float, Between(0.0)]},
        protocol={
            "machine": str,
            "threads": Positive | None,
            "prompt_tokens": Positive,
            "new_tokens": Positive,
            "cuda_graph": bool,
            "dtype": str,
        },
        shown=("tokens_per_s",),
    )
)


def fitting_prompt(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> int:
    """So many tokens, or as many as leave room for the new ones in the model's context."""
    context = context_length(model) or prompt_tokens + new_tokens + _NOT_TIMED
    return max(1, min(prompt_tokens, context - new_tokens - _NOT_TIMED))


@torch.no_grad()
def prefill_speed(model: PreTrainedModel, batch: int, prompt_tokens: int) -> float:
    """Tokens per second of one pass over a prompt of random tokens, without a cache: the median of 5."""
    prompt = _prompt(model, batch, prompt_tokens)
    with evaluation_mode(model):
        call = functools.partial(model, prompt, use_cache=False, logits_to_keep=1)
        return prompt.numel() / _median_seconds(call, prompt.device, 5)


@torch.no_grad()
def decoding_speed(model: PreTrainedModel, batch: int, prompt_tokens: int, new_tokens: int) -> tuple[float, bool]:
    """Tokens per second of decoding, and whether its steps were replays of a CUDA graph.

    With a prompt of random tokens in a static cache, a step decodes one token of each sequence of the batch;
    `new_tokens` steps are timed, and the median counts. On a GPU a step is a CUDA graph, where the model can be
    captured. Nothing is switched for it: a dense model computes as torch does by default, a sparse one by the kernels
    that it has where it stands."""
    prompt = _prompt(model, batch, prompt_tokens)
    device, token = prompt.device, prompt[:, :1].clone()
    cache = StaticCache(config=model.config, max_cache_len=prompt_tokens + new_tokens + _NOT_TIMED)
    position = torch.full((1, 1), prompt_tokens, device=device)

    def step() -> Any:
        return model(token, past_key_values=cache, position_ids=position, use_cache=True).logits

    with evaluation_mode(model):
        with fast_products(model):
            model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if device.type == "cuda":
            try:
                return batch * 1e6 / time_calls([step], device, repeats=new_tokens), True
            except RuntimeError:  # a model that cannot be captured runs step by step
                torch.cuda.synchronize(device)
        return batch / _median_seconds(step, device, new_tokens), False


def _prompt(model: PreTrainedModel, batch: int, tokens: int) -> torch.Tensor:
    words = model.config.get_text_config().vocab_size
    return torch.randint(words, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device_of(model))


def _median_seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])  # the first one compiles, and measures kernels
