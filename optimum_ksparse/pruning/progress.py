"""Progress of pruning: a bar for people, and the same as values for programs that listen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from tqdm.auto import tqdm

from .memory import memory_in_use


@dataclass(frozen=True)
class BlockDone:
    """One block is done.

    Attributes:
        done, total: blocks. resumed: of those done, how many an earlier process did.
        seconds: since the first of this process. seconds_left: at the pace so far.
        memory_bytes, peak_memory_bytes: of the process (or of the GPU, where one is used); 0 where the system does not
            tell.
        tokens_per_second: calibration tokens of all processes through this block, pruning included; 0 for a method
            without data.
    """

    done: int
    total: int
    resumed: int
    seconds: float
    seconds_left: float
    memory_bytes: int
    peak_memory_bytes: int
    tokens_per_second: float


_LISTENER: ContextVar[Callable[[BlockDone], None] | None] = ContextVar("_LISTENER", default=None)


@contextmanager
def listening(listener: Callable[[BlockDone], None] | None) -> Iterator[None]:
    """Within it, `listener` is told of each block that is done; None: nobody is."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def blocks_with_progress(
    description: str, total: int, start: int = 0, tokens: int = 0, show: bool = True
) -> Iterator[int]:
    """The numbers of the blocks from `start` on, one at a time, under a bar, of which `show` says whether it is seen;
    the next one is asked for when one is done. `tokens` run through each block."""
    began = last = time.perf_counter()
    with tqdm(total=total, initial=start, desc=description, unit="block", disable=not show) as bar:
        for index in range(start, total):
            yield index
            now, (memory, peak) = time.perf_counter(), memory_in_use()
            speed, done = tokens / max(now - last, 1e-9), index + 1
            left = (now - began) / (done - start) * (total - done)
            last = now
            text = f"memory {memory / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB"
            bar.set_postfix_str(f"{text}, {speed:,.0f} tokens/s" if tokens else text, refresh=False)
            bar.update()
            if (listener := _LISTENER.get()) is not None:
                times = round(now - began, 2), round(left, 2)
                listener(BlockDone(done, total, start, *times, memory, peak, round(speed, 1)))
