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


@contextmanager
def block_progress(description: str, total: int, start: int, tokens: int, show: bool) -> Iterator[Callable[[], None]]:
    """A bar over the blocks from `start` on, of which `show` says whether it is seen; gives the function to call after
    each. `tokens` run through each block."""
    began = last = time.perf_counter()
    done = start

    def advance() -> None:
        nonlocal last, done
        now = time.perf_counter()
        done += 1
        pace = (now - began) / (done - start)
        memory, peak = memory_in_use()
        speed = tokens / max(now - last, 1e-9)
        last = now
        if bar is not None:
            text = f"memory {memory / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB"
            bar.set_postfix_str(f"{text}, {speed:,.0f} tokens/s" if tokens else text, refresh=False)
            bar.update()
        listener = _LISTENER.get()
        if listener is not None:
            left = pace * (total - done)
            listener(
                BlockDone(done, total, start, round(now - began, 2), round(left, 2), memory, peak, round(speed, 1))
            )

    bar = tqdm(total=total, initial=start, desc=description, unit="block") if show else None
    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()
