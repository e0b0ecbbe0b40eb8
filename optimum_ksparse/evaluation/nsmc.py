"""NSMC, the Naver sentiment movie corpus (https://github.com/e9t/nsmc): few-shot sentiment of film reviews."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..blocks import evaluation_mode
from ..checks import check_integer
from ..data import prepends_bos
from ..data.tokens import context_length
from .answers import Query, answer_queries, score_answers
from .environment import check_causal_lm, check_prepend_bos, environment
from .nsmc_data import NsmcData, Review, describe_nsmc, draw_nsmc

PROMPTS = {"1": "문장: {s}\n감정:", "2": "다음 문장은 긍정일까요 부정일까요?\n{s}\n정답:"}
ANSWERS = (" 부정", " 긍정")  # of label 0 and label 1
NUM_FEWSHOT, NUM_SAMPLES, MAX_EXAMPLE_TOKENS, SEED = 10, 500, 25, 1234
_SAME_TOKEN = "both answers begin with the same token"


def evaluate_nsmc(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    num_fewshot: int = NUM_FEWSHOT,
    num_samples: int = NUM_SAMPLES,
    max_example_tokens: int = MAX_EXAMPLE_TOKENS,
    seed: int = SEED,
    batch_size: int = 8,
    prepend_bos: bool | None = None,
    prompts: Sequence[str] = tuple(PROMPTS),
) -> dict[str, dict[str, Any]]:
    """Few-shot accuracy of a causal LM on NSMC, with each of two prompts:

        문장: {s}⏎감정:                                   and   다음 문장은 긍정일까요 부정일까요?⏎{s}⏎정답:

    Solved examples (prompt and answer), apart by a blank line, stand before an item's prompt; the answers are ` 긍정`
    and ` 부정`. Texts are reduced to Hangul and single spaces: syllables and single letters (ㅋㅋ, ㅠㅠ), which the
    Hangul range of Unicode holds too; white space becomes a space, everything else is dropped, and a text with
    nothing left is left out. Examples and items are drawn with the seed, with the labels that come.

    An answer's likelihood is that of all its tokens in sum, so that it does not depend on how a tokenizer splits it.
    Where a tokenizer merges signs of the prompt with the answer, both answers count from the last token that is the
    same with both of them and with the prompt alone.

    Args:
        model: causal LM, dense or sparse, where it is. Log-softmax is in float32, at the answers' positions alone.
        tokenizer: the model's.
        data_dir: a folder of `nsmc/train.jsonl` and `nsmc/test.jsonl` (or `nsmc/validation.jsonl`) with `document` and
            `label`, or of the files themselves, which needs no network. None reads `e9t/nsmc` from the Hub, at its
            revision `refs/convert/parquet`.
        num_fewshot: solved examples, drawn from the training split. max_example_tokens: tokens of an example's text.
        num_samples: items, drawn from the test split, where there is none the validation split.
        seed: of both draws.
        batch_size: sequences in one forward pass; changes nothing but the time.
        prepend_bos: begin each sequence with the beginning token; None does so where the tokenizer does.
        prompts: "1", "2" or both.

    Returns:
        For each prompt a dict of `accuracy` (by the likelier answer), `accuracy_stderr`, `macro_f1`, `greedy_accuracy`
        (the most likely next token is the first one of the right answer; None where both answers begin with the same
        token, which `greedy_note` says), and how they were measured: `data`, `split`, `num_samples`, `num_fewshot`,
        `max_example_tokens`, `seed`, `prompt`, `example_labels`, `items_sha256` (of examples and items),
        `prepend_bos`, `dtype`, `batch_size`, `device`, `versions`.

    Raises:
        TypeError, ValueError: an argument is out of range, a line of the data is not as it must be, the model's
            context is too short, or its figures are NaN.
        FileNotFoundError: a file of `data_dir` is missing.
        ImportError, ConnectionError: `datasets` is not installed, or the Hub cannot be read.
    """
    counts = {"num_fewshot": (num_fewshot, 0), "num_samples": (num_samples, 1), "seed": (seed, 0)}
    counts |= {"max_example_tokens": (max_example_tokens, 1), "batch_size": (batch_size, 1)}
    for name, (value, least) in counts.items():
        check_integer(name, value, least)
    if not prompts or not all(prompt in PROMPTS for prompt in prompts):
        raise ValueError(f"prompts={prompts!r} must be some of {', '.join(map(repr, PROMPTS))}")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer must be the model's tokenizer, found {type(tokenizer).__name__}")
    check_causal_lm(model)
    begins = prepends_bos(tokenizer, check_prepend_bos(prepend_bos))
    data = draw_nsmc(tokenizer, data_dir, num_fewshot, num_samples, max_example_tokens, seed)
    items = {name: _tokenize(PROMPTS[name], data, tokenizer, begins) for name in dict.fromkeys(prompts)}
    _check_length(model, [query for found in items.values() for item in found for query in item])
    return {
        name: {
            **_run(model, found, data.items, f"NSMC, prompt {name}", batch_size),
            "data": describe_nsmc(data_dir, num_fewshot),
            "split": data.split,
            "num_samples": num_samples,
            "num_fewshot": num_fewshot,
            "max_example_tokens": max_example_tokens,
            "seed": seed,
            "prompt": PROMPTS[name],
            "example_labels": [review.label for review in data.examples],
            "items_sha256": data.sha256,
            "prepend_bos": begins,
            "batch_size": batch_size,
            **environment(model),
        }
        for name, found in items.items()
    }


def _tokenize(prompt: str, data: NsmcData, tokenizer: PreTrainedTokenizerBase, bos: bool) -> list[list[Query]]:
    """For each item what the model reads to solve it."""
    solved = [prompt.replace("{s}", review.text) + ANSWERS[review.label] for review in data.examples]
    texts = ["\n\n".join([*solved, prompt.replace("{s}", review.text)]) for review in data.items]
    prefix = [tokenizer.bos_token_id] if bos else []

    def encode(answer: str) -> list[list[int]]:
        whole = [text + answer for text in texts]
        return [prefix + ids for ids in tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]]

    return [answer_queries(*ids) for ids in zip(encode(""), *map(encode, ANSWERS), strict=True)]


def _check_length(model: PreTrainedModel, queries: list[Query]) -> None:
    longest, length = max(len(query.ids) for query in queries), context_length(model)
    if length is not None and longest > length:
        raise ValueError(
            f"the longest prompt of NSMC has {longest} tokens, and the model's context is {length}: pass fewer "
            "examples (num_fewshot) or shorter ones (max_example_tokens)"
        )


def _run(
    model: PreTrainedModel, items: list[list[Query]], reviews: list[Review], title: str, batch_size: int
) -> dict[str, Any]:
    """The figures of one prompt."""
    queries = [(i, query) for i, item in enumerate(items) for query in item]
    queries.sort(key=lambda pair: -len(pair[1].ids))  # little padding, and the largest batch first
    likelihoods = [[0.0, 0.0] for _ in items]
    greedy = [0] * len(items)
    firsts: list[list[int]] = [[0, 0] for _ in items]
    with evaluation_mode(model), tqdm(total=len(queries), desc=title, unit="sequence") as progress:
        for start in range(0, len(queries), batch_size):
            batch = queries[start : start + batch_size]
            for (i, query), (found, best) in zip(
                batch, score_answers(model, [query for _, query in batch]), strict=True
            ):
                greedy[i] = best
                for label, value, target in zip(query.labels, found, query.targets, strict=True):
                    likelihoods[i][label], firsts[i][label] = value, target[0]
            progress.update(len(batch))
    if any(math.isnan(value) for pair in likelihoods for value in pair):
        raise ValueError(
            f"{type(model).__name__} gives NaN for this text; load it in float32 or bfloat16, or look at its weights"
        )
    labels = [review.label for review in reviews]
    chosen = [int(positive > negative) for negative, positive in likelihoods]
    count = len(labels)
    accuracy = sum(a == b for a, b in zip(chosen, labels, strict=True)) / count
    tells = all(negative != positive for negative, positive in firsts)
    right = sum(best == first[label] for best, first, label in zip(greedy, firsts, labels, strict=True))
    return {
        "accuracy": accuracy,
        "accuracy_stderr": math.sqrt(accuracy * (1 - accuracy) / (count - 1)) if count > 1 else None,
        "macro_f1": sum(_f1(chosen, labels, label) for label in (0, 1)) / 2,
        "greedy_accuracy": right / count if tells else None,
        "greedy_note": None if tells else _SAME_TOKEN,
    }


def _f1(chosen: list[int], labels: list[int], label: int) -> float:
    hits = sum(a == b == label for a, b in zip(chosen, labels, strict=True))
    return 2 * hits / max(1, chosen.count(label) + labels.count(label))
