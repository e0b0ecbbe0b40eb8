"""Calibration samples of a mix of data."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..config import SparsityConfig
from ..dataset import describe_dataset, mix_shares


def draw_mix(
    config: SparsityConfig, draw: Callable[[SparsityConfig], tuple[torch.Tensor, bool, str]]
) -> tuple[torch.Tensor, bool, dict[str, Any]]:
    """Draws each part of the mix `config.dataset` with the same seed, and shuffles their samples with it, so that
    batches are mixed.

    Args:
        config: of the whole.
        draw: for the settings of a part, its samples [num_samples, seq_len], whether all of them begin with the
            beginning token, and their form.

    Returns:
        The samples [num_samples, seq_len], whether all of them begin with the beginning token, and what the
        description says of each part.

    Raises:
        ValueError: a part is the fingerprint of a file, or some samples only would lose their first position.
    """
    shares = mix_shares(config.dataset, config.num_samples)
    for part, _ in shares:
        if isinstance(part, Mapping):
            raise ValueError(
                f"dataset is the record of an earlier mix, of whose data {part} is only the fingerprint: pass the mix "
                'again to prune with, with the files themselves, as {"texts.txt": 0.5, …}'
            )
    drawn, rows = [], []
    for part, share in shares:
        own = copy.copy(config)
        own.dataset, own.num_samples = part, share
        ids, bos, form = draw(own)
        drawn.append(ids)
        row = {"dataset": describe_dataset(part), "num_samples": share, "form": form, "begins_with_bos": bos}
        rows.append(row)
    begins = {row["begins_with_bos"] for row in rows}
    if len(begins) > 1 and not config.bos_in_statistics:
        raise ValueError(
            "bos_in_statistics=False leaves out the first position of every sample, and in this mix the samples of "
            "'self' alone begin with the beginning token: pass prepend_bos=True, or bos_in_statistics=True"
        )
    order = list(range(config.num_samples))
    random.Random(config.seed).shuffle(order)
    return torch.cat(drawn)[order], begins == {True}, {"parts": rows}
