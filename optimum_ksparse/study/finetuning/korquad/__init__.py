"""KorQuAD 1.0: answers that are spans of a paragraph, by a causal model with a span head. `run`, which trains, imports
`Trainer` and PEFT."""

from .data import KORQUAD_DATASET, KorQuADData, Question, korquad_data, read_korquad, split_by_article
from .metric import korquad_scores
from .model import SpanModel, load_korquad_model
from .prediction import evaluate_korquad, predict

__all__ = [
    "KORQUAD_DATASET",
    "KorQuADData",
    "Question",
    "SpanModel",
    "evaluate_korquad",
    "korquad_data",
    "korquad_scores",
    "load_korquad_model",
    "predict",
    "read_korquad",
    "split_by_article",
]
