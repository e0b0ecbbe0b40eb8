"""Magnitude: the smallest weights go, whatever their inputs are; no data. Han et al. 2015, arXiv 1506.02626."""

from __future__ import annotations

import torch

from ..pattern import Pattern

CITATION = """@misc{han2015learning,
  title  = {Learning both Weights and Connections for Efficient Neural Networks},
  author = {Han, Song and Pool, Jeff and Tran, John and Dally, William J.},
  year   = {2015},
  eprint = {1506.02626},
  archivePrefix = {arXiv}
}"""


def prune(weight: torch.Tensor, statistics: None, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """Score |W|, ranked over the whole layer (blocks by their sums), or within each group of `n:m`. Statistics are not
    read: the method needs no data."""
    mask = pattern.mask_of_layer(weight.abs())
    return weight.masked_fill(~mask, 0), mask
