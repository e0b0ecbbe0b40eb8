"""The metric of KorQuAD 1.0 (Lim et al. 2019, https://arxiv.org/abs/1909.07005): that of SQuAD 1.1 with characters in
the place of words, as its official script `evaluate-v1.0.py` computes it."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Iterable, Mapping

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


def korquad_scores(predictions: Mapping[str, str], answers: Iterable[tuple[str, Iterable[str]]]) -> dict[str, float]:
    """Exact match and F1 over all questions, the best over the answers of each.

    Args:
        predictions: id of a question → text. A question without one counts 0.
        answers: for each question its id and its right answers.

    Returns:
        `exact_match` and `f1`, in per cent.

    Raises:
        ValueError: there are no questions, an id comes twice or is predicted and not asked, or a question has no
            answer; names it.
    """
    scores: dict[str, tuple[float, float]] = {}
    for name, texts in answers:
        if name in scores:
            raise ValueError(f"answers: the id {name!r} comes twice")
        if not (texts := list(texts)):
            raise ValueError(f"answers: the question {name!r} has no answer")
        text = predictions.get(name)
        scores[name] = (
            (0.0, 0.0) if text is None else (max(exact_match(text, t) for t in texts), max(f1(text, t) for t in texts))
        )
    if not scores:
        raise ValueError("answers is empty: there is nothing to score")
    if unknown := predictions.keys() - scores.keys():
        raise ValueError(f"predictions: {min(unknown)!r} is not the id of a question")
    means = [100 * math.fsum(column) / len(scores) for column in zip(*scores.values(), strict=True)]
    return dict(zip(("exact_match", "f1"), means, strict=True))
