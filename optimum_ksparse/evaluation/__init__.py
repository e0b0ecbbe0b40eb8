"""Measuring models."""

from .fingerprint import fingerprint
from .kobest import KOBEST_TASKS, evaluate_kobest
from .measure import (
    Baseline,
    EvaluationProtocol,
    evaluate_baseline,
    evaluate_model,
    recorded_baseline,
    set_aside,
)
from .perplexity import evaluate_perplexity
from .results import RESULTS_NAME, EvaluationResults, Measurement

__all__ = [
    "KOBEST_TASKS",
    "RESULTS_NAME",
    "Baseline",
    "EvaluationProtocol",
    "EvaluationResults",
    "Measurement",
    "evaluate_baseline",
    "evaluate_kobest",
    "evaluate_model",
    "evaluate_perplexity",
    "fingerprint",
    "recorded_baseline",
    "set_aside",
]
