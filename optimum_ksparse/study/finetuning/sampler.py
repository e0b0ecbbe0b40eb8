"""The order in which examples train."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

# Batches that are sorted by length together.
_POOL = 50


class LengthSampler(Sampler[int]):
    """A random order in which examples of like length come together, so that little of a batch is padding.

    The order of an epoch follows from the seed and its number alone, so that a run that goes on finds it again; that
    of transformers' `LengthGroupedSampler` depends on what was drawn before.

    Args:
        lengths: of the examples. batch_size: examples of a batch. seed: draws the orders.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed}-{self.epoch}")
        order = list(range(len(self.lengths)))
        draw.shuffle(order)
        pool = self.batch_size * _POOL
        batches = []
        for i in range(0, len(order), pool):
            part = sorted(order[i : i + pool], key=lambda j: self.lengths[j])
            batches += [part[j : j + self.batch_size] for j in range(0, len(part), self.batch_size)]
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        draw.shuffle(whole)  # steps of short and of long examples take turns
        for batch in [*whole, *(batch for batch in batches if len(batch) < self.batch_size)]:
            yield from batch
