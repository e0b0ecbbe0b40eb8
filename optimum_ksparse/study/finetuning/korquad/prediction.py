"""Answers of a span model, and the metric of KorQuAD 1.0 (Lim et al. 2019, https://arxiv.org/abs/1909.07005): that of
SQuAD 1.1 with characters in the place of words, as its official script `evaluate-v1.0.py` computes it."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ....blocks import evaluation_mode
from ....evaluation.running import environment
from ....kernels import fast_products, product_dtype
from ..settings import KorQuADSettings
from .data import KorQuADData, Question
from .model import SpanModel
from .windows import collate, make_windows

# Tokens of an answer at most; starts and ends of each window that are combined; windows in one forward pass.
MAX_ANSWER_TOKENS, NUM_BEST, BATCH_SIZE = 30, 20, 8


def evaluate_korquad(
    model: SpanModel, tokenizer: PreTrainedTokenizerBase, data: KorQuADData, settings: KorQuADSettings
) -> dict[str, Any]:
    """A row of results: exact match and F1 of a span model on KorQuAD 1.0, in per cent, and how they were measured.
    `settings` are those of `windows.fitted`."""
    questions = data.questions[: settings.max_eval_questions]
    answers = predict(model, tokenizer, questions, settings)
    measured = environment(model.language_model, "peft")
    if settings.bf16 and measured["dtype"] == "float32":
        measured["dtype"] = "float32, products in bfloat16"
        measured["product_dtype"] = str(product_dtype(torch.bfloat16, model.head.weight.device)).removeprefix("torch.")
    return {
        **korquad_scores(answers, {question.id: question.answers for question in questions}),
        "data": data.description,
        "split": data.split,
        "num_samples": len(questions),
        **{name: getattr(settings, name) for name in ("seq_len", "max_question_tokens", "stride", "prepend_bos")},
        "max_answer_tokens": MAX_ANSWER_TOKENS,
        "num_best": NUM_BEST,
        "batch_size": BATCH_SIZE,
        **measured,
    }


@torch.no_grad()
def predict(
    model: SpanModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], settings: KorQuADSettings
) -> dict[str, str]:
    """The answer to each question, id → text, cut from its paragraph: the likeliest span over all of its windows.
    Scores are log-probabilities over the paragraph tokens of a window and its end, which stands for "not here", so
    that those of different windows may be compared."""
    windows = make_windows(questions, tokenizer, settings)
    windows.sort(key=lambda window: -len(window["input_ids"]))  # like lengths together; too large fails first
    device = model.head.weight.device
    best: dict[int, tuple[float, int, int]] = {}
    with (
        evaluation_mode(model),
        fast_products(model, torch.bfloat16 if settings.bf16 else None),
        torch.autocast(device.type, torch.bfloat16) if settings.bf16 else nullcontext(),
        tqdm(total=len(windows), desc="KorQuAD", unit="window") as bar,
    ):
        for i in range(0, len(windows), BATCH_SIZE):
            part = windows[i : i + BATCH_SIZE]
            batch = {name: t.to(device) for name, t in collate(part).items() if "positions" not in name}
            output = model(**batch)
            for window, start, end in zip(part, output.start_logits, output.end_logits, strict=True):
                paragraph = slice(window["first"], len(window["input_ids"]))
                if (span := best_span(start[paragraph], end[paragraph])) is not None:
                    score, first, last = span
                    place = (window["offsets"][first][0], window["offsets"][last][1])
                    candidate = (score, -place[0], -place[1])  # of equal ones the first, and the shortest
                    best[window["question"]] = max(best.get(window["question"], candidate), candidate)
            bar.update(len(part))
    chosen = {questions[number]: (-start, -end) for number, (_, start, end) in best.items()}
    return {question.id: question.context[start:end].strip() for question, (start, end) in chosen.items()}


def best_span(
    start_logits: torch.Tensor, end_logits: torch.Tensor, max_answer_tokens: int = MAX_ANSWER_TOKENS
) -> tuple[float, int, int] | None:
    """The likeliest span of a window, of its `NUM_BEST` likeliest starts and ends: log-probability, first and last
    token; None where none of them makes one. Logits are [tokens] of the paragraph, and of the end as the last one."""
    starts, ends = (
        logits.log_softmax(-1)[:-1].topk(min(NUM_BEST, len(logits) - 1)) for logits in (start_logits, end_logits)
    )
    length = ends.indices - starts.indices[:, None]
    scores = starts.values[:, None] + ends.values
    scores = scores.masked_fill((length < 0) | (length >= max_answer_tokens), -torch.inf)
    if not scores.numel() or scores.max() == -torch.inf:
        return None
    row, column = divmod(int(scores.argmax()), scores.shape[1])
    return float(scores.max()), int(starts.indices[row]), int(ends.indices[column])


_TO_SPACE = str.maketrans(dict.fromkeys("'\"《》<>〈〉()‘’", " "))
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation))


def normalize_answer(text: str) -> str:
    """What of an answer is compared: quotes and brackets are spaces, case and ASCII punctuation do not count, runs of
    whitespace are one space."""
    return " ".join(text.translate(_TO_SPACE).lower().translate(_PUNCTUATION).split())


def exact_match(prediction: str, answer: str) -> float:
    """1.0 where the two are equal after `normalize_answer`, else 0.0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall, from 0 to 1, over the characters of the two without their spaces, as
    multisets; 0.0 where they share none, and so where both are empty."""
    predicted, right = (Counter(normalize_answer(text).replace(" ", "")) for text in (prediction, answer))
    same = (predicted & right).total()
    if same == 0:
        return 0.0
    precision, recall = same / predicted.total(), same / right.total()
    return 2 * precision * recall / (precision + recall)


def korquad_scores(predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """`exact_match` and `f1` in per cent over all questions, the best over the right answers (at least one) of each; a
    question without a prediction counts 0. Both by the id of the question."""
    pairs = [(predictions[name], texts) for name, texts in answers.items() if name in predictions]
    scores = {}
    for score in (exact_match, f1):
        best = [max(score(prediction, text) for text in texts) for prediction, texts in pairs]
        scores[score.__name__] = 100 * math.fsum(best) / len(answers)
    return scores
