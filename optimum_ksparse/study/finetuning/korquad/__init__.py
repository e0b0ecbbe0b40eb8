"""KorQuAD 1.0: answers that are spans of a paragraph, by a causal model with a span head."""

from ....records import HEAD_NAME
from .data import KORQUAD_DATASET, KorQuADData, Question, korquad_data, read_korquad, split_by_article
from .features import WindowSettings
from .model import SpanModel
from .prediction import evaluate_korquad, predict
from .run import finetune_korquad, make_span_model
from .saving import load_korquad_model, save_korquad_model

__all__ = [
    "HEAD_NAME",
    "KORQUAD_DATASET",
    "KorQuADData",
    "Question",
    "SpanModel",
    "WindowSettings",
    "evaluate_korquad",
    "finetune_korquad",
    "korquad_data",
    "load_korquad_model",
    "make_span_model",
    "predict",
    "read_korquad",
    "save_korquad_model",
    "split_by_article",
]
