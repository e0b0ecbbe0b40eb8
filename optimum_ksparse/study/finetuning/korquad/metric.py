"""The metric of KorQuAD 1.0 (Lim et al. 2019, https://arxiv.org/abs/1909.07005): that of SQuAD 1.1 with characters in
the place of words, as its official script `evaluate-v1.0.py` computes it."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Mapping, Sequence

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
    """Exact match and F1 over all questions, the best over the answers of each.

    Args:
        predictions: id of a question → text. A question without one counts 0.
        answers: id of each question → its right answers, at least one.

    Returns:
        `exact_match` and `f1`, in per cent.
    """
    scores = [
        tuple(
            max(score(predictions[name], text) for text in texts) if name in predictions else 0.0
            for score in (exact_match, f1)
        )
        for name, texts in answers.items()
    ]
    means = [100 * math.fsum(column) / len(scores) for column in zip(*scores, strict=True)]
    return dict(zip(("exact_match", "f1"), means, strict=True))
