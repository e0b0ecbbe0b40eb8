"""Calibration samples of a mix of data."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from .calibration import CalibrationData
from .dataset import describe_dataset, mix_shares


def draw_mix(
    data: CalibrationData, draw: Callable[[CalibrationData], tuple[torch.Tensor, bool, str]]
) -> tuple[torch.Tensor, bool, dict[str, Any]]:
    """Draws each part of the mix `data.dataset` with the same seed, and shuffles their samples with it, so that
    batches are mixed.

    Args:
        data: the whole.
        draw: for a part, its samples [num_samples, seq_len], whether all of them begin with the
            beginning token, and their form.

    Returns:
        The samples [num_samples, seq_len], whether all of them begin with the beginning token, and what the
        description says of each part.

    Raises:
        ValueError: a part is the fingerprint of a file.
    """
    shares = mix_shares(data.dataset, data.num_samples)
    for part, _ in shares:
        if isinstance(part, Mapping):
            raise ValueError(
                f"dataset is the record of an earlier mix, of whose data {part} is only the fingerprint: pass the mix "
                'again to prune with, with the files themselves, as {"texts.txt": 0.5, …}'
            )
    drawn, rows = [], []
    for part, share in shares:
        ids, bos, form = draw(replace(data, dataset=part, num_samples=share))
        drawn.append(ids)
        row = {"dataset": describe_dataset(part), "num_samples": share, "form": form, "begins_with_bos": bos}
        rows.append(row)
    order = list(range(data.num_samples))
    random.Random(data.seed).shuffle(order)
    return torch.cat(drawn)[order], all(row["begins_with_bos"] for row in rows), {"parts": rows}
