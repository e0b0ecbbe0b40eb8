"""The metric of KorQuAD 1.0 (Lim et al. 2019, https://arxiv.org/abs/1909.07005): that of SQuAD 1.1 with characters in
the place of words, as its official script `evaluate-v1.0.py` computes it. `KorQuAD` is the same as a metric of
`evaluate` (extra `eval`)."""

from __future__ import annotations

import importlib.util
import math
import string
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ....version import install_hint

if TYPE_CHECKING:
    from .metric import KorQuAD

__all__ = ["KorQuAD", "exact_match", "f1", "korquad_scores", "normalize_answer"]

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
    found, wanted = (Counter(normalize_answer(text).replace(" ", "")) for text in (prediction, answer))
    same = (found & wanted).total()
    if same == 0:
        return 0.0
    precision, recall = same / found.total(), same / wanted.total()
    return 2 * precision * recall / (precision + recall)


def korquad_scores(predictions: Mapping[str, str], references: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Exact match and F1 over all questions, the best over the answers of each.

    Args:
        predictions: id of a question → text. A question without one counts 0.
        references: for each question `{"id", "answers": {"text": [...]}}`.

    Returns:
        `exact_match` and `f1`, in per cent.

    Raises:
        TypeError: a prediction or an answer is no text.
        ValueError: there are no references, an id comes twice or is predicted and not asked, or a question has no
            answer; names it.
    """
    answers: dict[str, list[str]] = {}
    for reference in references:
        if reference["id"] in answers:
            raise ValueError(f"references: the id {reference['id']!r} comes twice")
        answers[reference["id"]] = _texts(reference)
    if not answers:
        raise ValueError("references is empty: there is nothing to score")
    for name, text in predictions.items():
        if name not in answers:
            raise ValueError(f"predictions: {name!r} is not the id of a question in references")
        if not isinstance(text, str):
            raise TypeError(f"predictions: the answer to {name!r} must be a text, found {text!r}")
    scored = [(predictions[name], texts) for name, texts in answers.items() if name in predictions]
    return {
        "exact_match": 100
        * math.fsum(max(exact_match(text, t) for t in texts) for text, texts in scored)
        / len(answers),
        "f1": 100 * math.fsum(max(f1(text, t) for t in texts) for text, texts in scored) / len(answers),
    }


def _texts(reference: Mapping[str, Any]) -> list[str]:
    texts = list(reference["answers"]["text"])
    if not texts:
        raise ValueError(f"references: the question {reference['id']!r} has no answer")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"references: an answer to {reference['id']!r} must be a text, found {text!r}")
    return texts


def __getattr__(name: str) -> Any:
    if name != "KorQuAD":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec("evaluate") is None:
        raise ImportError(f"KorQuAD as a metric needs evaluate: {install_hint('eval')}")
    from .metric import KorQuAD

    return KorQuAD
