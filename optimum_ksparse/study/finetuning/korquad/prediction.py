"""Answers of a span model, and its figures on KorQuAD."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ....blocks import evaluation_mode
from ....checks import check_integer
from ....evaluation.environment import environment
from .data import KorQuADData, Question
from .features import Window, WindowSettings, collate, make_windows
from .model import SpanModel
from .scores import korquad_scores

MAX_ANSWER_TOKENS, NUM_BEST = 30, 20


@dataclass(frozen=True)
class Span:
    """A possible answer: characters of the paragraph, and the log-probability of its two ends."""

    start: int
    end: int
    score: float


def evaluate_korquad(
    model: SpanModel,
    tokenizer: PreTrainedTokenizerBase,
    data: KorQuADData,
    *,
    windows: WindowSettings | None = None,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
    num_best: int = NUM_BEST,
    batch_size: int = 8,
    bf16: bool = False,
    max_questions: int | None = None,
) -> dict[str, Any]:
    """Exact match and F1 of a span model on KorQuAD 1.0.

    Args:
        model, tokenizer: as `finetune_korquad` or `load_korquad_model` gave them.
        data: what to measure on.
        windows: how the data become windows; None takes the defaults for the model.
        max_answer_tokens: of an answer at most. num_best: starts and ends of each window that are combined.
        batch_size: windows in one forward pass.
        bf16: matrix products in bfloat16 under autocast.
        max_questions: from the first on; None takes all.

    Returns:
        `exact_match` and `f1` in per cent, and how they were measured: `data`, `split`, `num_samples`, `seq_len`,
        `max_question_tokens`, `stride`, `max_answer_tokens`, `num_best`, `prepend_bos`, `dtype`, `batch_size`,
        `device`, `versions`.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """
    if max_questions is not None:
        check_integer("max_questions", max_questions, 1)
    windows = windows or WindowSettings.for_model(model.language_model, tokenizer)
    questions = data.questions[:max_questions]
    how = {"max_answer_tokens": max_answer_tokens, "num_best": num_best}
    texts = predict(model, tokenizer, questions, windows, batch_size=batch_size, bf16=bf16, **how)
    measured = environment(model.language_model, "peft")
    if bf16 and measured["dtype"] == "float32":
        measured["dtype"] = "float32, products in bfloat16"
    return {
        **korquad_scores(texts, [question.reference for question in questions]),
        "data": data.description,
        "split": data.split,
        "num_samples": len(questions),
        **asdict(windows),
        **how,
        "batch_size": batch_size,
        **measured,
    }


def predict(
    model: SpanModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    settings: WindowSettings,
    *,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
    num_best: int = NUM_BEST,
    batch_size: int = 8,
    bf16: bool = False,
) -> dict[str, str]:
    """The answer to each question, id → text, cut from its paragraph."""
    found = best_spans(
        model,
        make_windows(questions, tokenizer, settings),
        max_answer_tokens=max_answer_tokens,
        num_best=num_best,
        batch_size=batch_size,
        bf16=bf16,
    )
    spans = {number: max(all_of_it, key=lambda span: span.score) for number, all_of_it in found.items() if all_of_it}
    return {questions[n].id: questions[n].context[span.start : span.end].strip() for n, span in spans.items()}


@torch.no_grad()
def best_spans(
    model: SpanModel,
    windows: Sequence[Window],
    *,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
    num_best: int = NUM_BEST,
    batch_size: int = 8,
    bf16: bool = False,
) -> dict[int, list[Span]]:
    """Number of a question → its likeliest spans over all of its windows, best first, at most `num_best`.

    Scores are log-probabilities over the paragraph tokens of a window and its end token, which stands for "not here",
    so that those of different windows may be compared; a span that several windows hold has the best of its scores.
    """
    for name, value in (("max_answer_tokens", max_answer_tokens), ("num_best", num_best), ("batch_size", batch_size)):
        check_integer(name, value, 1)
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i]))  # like lengths together; too large fails first
    found: dict[int, dict[tuple[int, int], float]] = {window.question: {} for window in windows}
    with (
        evaluation_mode(model),
        _products(model, bf16),
        tqdm(total=len(windows), desc="KorQuAD", unit="window") as bar,
    ):
        for i in range(0, len(order), batch_size):
            part = [windows[j] for j in order[i : i + batch_size]]
            batch = {name: t.to(model.device) for name, t in collate(part, 0).items() if "positions" not in name}
            output = model(**batch)
            spans = _window_spans(output.start_logits, output.end_logits, part, max_answer_tokens, num_best)
            for window, pairs in zip(part, spans, strict=True):
                best = found[window.question]
                for start, end, score in pairs:
                    place = window.offsets[start][0], window.offsets[end][1]
                    best[place] = max(score, best.get(place, score))
            bar.update(len(part))
    return {
        number: sorted(
            (Span(*place, score) for place, score in best.items()), key=lambda s: (-s.score, s.start, s.end)
        )[:num_best]
        for number, best in found.items()
    }


def _window_spans(
    start_logits: torch.Tensor, end_logits: torch.Tensor, windows: Sequence[Window], longest: int, num_best: int
) -> list[list[tuple[int, int, float]]]:
    """For each window its best spans: first and last token, counted in its part of the paragraph, and score."""
    scores, places = [], []
    ends = torch.tensor([[len(window) - 1] for window in windows], device=start_logits.device)
    for logits in (start_logits, end_logits):
        logs = torch.log_softmax(logits, dim=-1).scatter(1, ends, -torch.inf)
        best = logs.topk(min(num_best, logs.shape[1]), dim=-1)
        scores.append(best.values)
        places.append(best.indices)
    together = scores[0].unsqueeze(2) + scores[1].unsqueeze(1)
    length = places[1].unsqueeze(1) - places[0].unsqueeze(2)
    together = together.masked_fill((length < 0) | (length >= longest), -torch.inf).flatten(1)
    best = together.topk(min(num_best, together.shape[1]), dim=-1)
    count = scores[1].shape[1]
    first = places[0].gather(1, best.indices // count).tolist()
    last = places[1].gather(1, best.indices % count).tolist()
    return [
        [(a - window.first, b - window.first, value) for a, b, value in zip(*row, strict=True) if value > -torch.inf]
        for window, *row in zip(windows, first, last, best.values.tolist(), strict=True)
    ]


def _products(model: SpanModel, bf16: bool) -> AbstractContextManager[Any]:
    return torch.autocast(model.device.type, torch.bfloat16) if bf16 else nullcontext()
