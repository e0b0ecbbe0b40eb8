"""Wanda: the smallest |W|·‖X‖ go, weights stay as they are. Sun et al. 2023, arXiv 2306.11695, equation 1."""

from __future__ import annotations

import torch

from ..pattern import Pattern
from .statistics import ColumnNorms

CITATION = """@misc{sun2023wanda,
  title  = {A Simple and Effective Pruning Approach for Large Language Models},
  author = {Sun, Mingjie and Liu, Zhuang and Bair, Anna and Kolter, J. Zico},
  year   = {2023},
  note   = {Wanda},
  eprint = {2306.11695},
  archivePrefix = {arXiv}
}"""


def prune(weight: torch.Tensor, statistics: ColumnNorms, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """Score |W_ij|·‖X_j‖₂, ranked within each output row, or within each group of `n:m`; blocks by their sums over the
    whole layer. Weights are not updated. The norms' common factor 1/√tokens leaves the ranking as it is."""
    mask = pattern.mask(weight.float().abs() * statistics.squared_norms.to(weight.device).sqrt())
    return weight.masked_fill(~mask, 0), mask
