"""KorQuAD 1.0: answers that are spans of a paragraph, by a causal model with a span head."""
