"""How long calls take on a device, without what launching them costs."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_REPEATS = 11
# Seconds of a round on a processor, whose scheduler spoils shorter ones.
_LEAST_ROUND = 0.005


def time_calls(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int = _REPEATS) -> float:
    """Microseconds of one call: the median, over `repeats` rounds, of a round of all `calls` divided by their number.

    On a GPU a round is one CUDA graph, as it is in a decoder that runs under graphs. Give calls that read different
    memory where one alone would stay in the cache.

    Raises:
        RuntimeError: a call fails, or cannot be captured.
    """
    return _time_graph(calls, device, repeats) if device.type == "cuda" else _time_wall(calls, repeats)


def rotations(nbytes: int, device: torch.device) -> int:
    """How many copies of `nbytes` it takes to be sure that a round finds none of them in the cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, -(-2 * cache // max(1, nbytes)) + 1))


def _time_graph(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int) -> float:
    # Not `torch.cuda.graph`, which collects garbage and empties the allocator's cache each time.
    with torch.cuda.device(device):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:  # compiles kernels, makes the handles of libraries
                call()
            torch.cuda.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for call in calls:
                    call()
            finally:
                graph.capture_end()
            graph.replay()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
            marks[0].record()
            for mark in marks[1:]:
                graph.replay()
                mark.record()
            torch.cuda.synchronize()
        torch.cuda.current_stream().wait_stream(stream)
        times = [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
        return statistics.median(times) * 1000 / len(calls)


def _time_wall(calls: Sequence[Callable[[], Any]], repeats: int) -> float:
    def round_of(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            for call in calls:
                call()
        return (time.perf_counter() - started) / times

    round_of(1)
    times = max(1, int(_LEAST_ROUND / max(1e-9, round_of(1))))
    return statistics.median(round_of(times) for _ in range(repeats)) * 1e6 / len(calls)
