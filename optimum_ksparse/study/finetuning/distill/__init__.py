"""Distillation: a sparse model learns the logits of the dense one, which are written to the disk once."""
