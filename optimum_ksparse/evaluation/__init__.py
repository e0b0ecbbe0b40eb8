"""Measuring models."""

from .perplexity import evaluate_perplexity

__all__ = ["evaluate_perplexity"]
